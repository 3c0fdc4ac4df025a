"""The same seeds give the same images, bit for bit, however the ranks are started and however many there are."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from harness.costs.plan_file import PredictionCheck
from harness.costs.traffic import sent_bytes, trace_network, weight_bytes
from harness.costs.vae_traffic import decode_bytes, trace_decode
from harness.records import load
from harness.records.media import pixel_hash
from harness.records.record import Record
from harness.resolve.compose import compose_run
from harness.tasks.plan.check import check
from models.components import Conditioning
from models.decoders import KLDecoder
from models.meta_init import build_empty
from models.pixart import PLAN, PixArt, read_config
from models.registry import REFERENCE
from tests.fixtures.commands import command, difference, hashes, record_of, run, status_of, torchrun

REQUESTED = ["request.prompts=[rocket,red apple,pizza]", "request.seed=5"]


def test_a_run_leaves_everything_it_promises(single: Path) -> None:
    assert status_of(single).state == "ok"
    record = record_of(single)
    assert [row.seed for row in record.samples] == [5, 6, 7]
    assert [row.prompt for row in record.samples] == ["rocket", "red apple", "pizza"]
    for row in record.samples:
        image = Image.open(single / row.path)
        assert image.size == (64, 64)
        assert image.text["prompt"] == row.prompt  # type: ignore[attr-defined]
        assert image.text["seed"] == str(row.seed)  # type: ignore[attr-defined]
        assert image.text["fingerprint"] == record.fingerprint  # type: ignore[attr-defined]
        assert pixel_hash(np.asarray(image)) == row.sha256
    assert (single / "grid.png").exists()
    assert (single / "logs" / "rank0.log").read_text()
    assert record.attention.requested == "auto"
    assert record.attention.resolved == "torch sdpa"
    assert record.summary.nfe == 2
    assert [stage.name for stage in record.repeats[0].steps] == [
        "input_validation",
        "text_encoding",
        "timestep_preparation",
        "latent_preparation",
        "denoising",
        "decoding",
    ]
    assert len(record.repeats[0].denoise_steps_ms) == 6
    assert record.provenance.threads_per_rank == 1
    table = load(single.parent)
    assert list(table["state"]) == ["ok"]
    assert table["summary.latency_ms.median"][0] == record.summary.latency_ms.median


def test_two_replicas_generate_the_same_bits(single: Path, tmp_path: Path) -> None:
    done = run(command(*REQUESTED, "parallel=dp2", f"hydra.run.dir={tmp_path / 'run'}"))
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "run") == hashes(single)
    assert len(record_of(tmp_path / "run").summary.peak_memory_mib) == 2


def sent(record: Record, stage: str) -> dict[str, int]:
    """Return the bytes of one stage in the record, by kind of collective."""
    return {kind: traffic.bytes for kind, traffic in record.summary.comm[stage].items() if traffic.bytes}


def assert_predicted(folder: Path) -> PredictionCheck:
    """Assert that a plan predicts what the record of a run says that its busiest rank sent."""
    record = record_of(folder)
    found = check(folder, record, lambda dtype: compose_run([]).config.hardware)
    assert found.predicted_bytes == found.sent_bytes == sent(record, "denoising")
    assert found.predicted_decoding_bytes == found.decoding_bytes == sent(record, "decoding")
    return found


def denoising_bytes(layout: str, evaluations: int) -> dict[str, int]:
    """Return the formula's bytes for this many evaluations of the reference model with guidance."""
    degrees = {"cfg2": (1, 2, 1, 1, 1), "tp2": (1, 1, 2, 1, 1), "ring2": (1, 1, 1, 2, 1), "ulysses2": (1, 1, 1, 1, 2)}
    config = replace(read_config(REFERENCE / "emoji" / "transformer"), stride=4)
    rows = 1 if layout == "cfg2" else 2
    condition = Conditioning(torch.empty(rows, 24, config.text_channels))
    inputs = (torch.empty(rows, config.in_channels, 16, 16), torch.empty(rows), condition)
    said = sent_bytes(trace_network(lambda: PixArt(config), PLAN, inputs), degrees[layout], itemsize=4)
    return {kind: count * evaluations for kind, count in said.items()}


def decoding_bytes(images: int) -> dict[str, int]:
    """Return the formula's bytes for decoding this many images of the reference model on two ranks."""
    config = AutoencoderKL.load_config(REFERENCE / "emoji" / "vae")

    def make() -> KLDecoder:
        return KLDecoder(AutoencoderKL.from_config(config))

    said = decode_bytes(
        trace_decode(make, torch.empty(1, make().latent_channels, 16, 16)), ranks=2, index=0, itemsize=4
    )
    return {kind: count * images for kind, count in said.items()}


@pytest.mark.parametrize(
    "layout", ["ring2", "cfg2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2", "ulysses2"))]
)
def test_ranks_that_share_an_image_generate_the_same(layout: str, single: Path, tmp_path: Path) -> None:
    done = run(command(*REQUESTED, f"parallel={layout}", f"hydra.run.dir={tmp_path / 'run'}"))
    assert done.returncode == 0, done.stderr
    assert difference(single, tmp_path / "run") <= 1  # rounding to 8 bits; float32 differs in the last digits
    record = record_of(tmp_path / "run")
    assert record.summary.nfe == record_of(single).summary.nfe
    assert sent(record, "denoising") == denoising_bytes(layout, record.summary.nfe * len(record.samples))
    assert sent(record, "decoding") == decoding_bytes(len(record.samples))
    assert_predicted(tmp_path / "run")
    assert record.attention.resolved == ("torch cpu flash" if layout == "ring2" else "torch sdpa")


@pytest.mark.slow
def test_sharded_weights_generate_the_same_bits(tmp_path: Path) -> None:
    for layout in ("ulysses2", "ulysses2_sharded"):
        done = run(command(*REQUESTED, f"parallel={layout}", f"hydra.run.dir={tmp_path / layout}"))
        assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "ulysses2_sharded") == hashes(tmp_path / "ulysses2")
    whole, sharded = sent(record_of(tmp_path / "ulysses2"), "denoising"), record_of(tmp_path / "ulysses2_sharded")
    network = build_empty(lambda: PixArt(read_config(REFERENCE / "emoji" / "transformer")), torch.float32, "meta")
    weights = weight_bytes(network, PLAN, ranks=2) * sharded.summary.nfe * len(sharded.samples)
    assert sent(sharded, "denoising") == whole | {"all_gather weights": weights}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["usp4", "cfg2_ulysses2", "tp2_ulysses2", "ulysses4"])
def test_four_ranks_that_share_an_image_generate_the_same(layout: str, single: Path, tmp_path: Path) -> None:
    done = run(command(*REQUESTED, f"parallel={layout}", f"hydra.run.dir={tmp_path / 'run'}"))
    assert done.returncode == 0, done.stderr
    assert difference(single, tmp_path / "run") <= 1


@pytest.mark.slow
def test_more_threads_generate_the_same_bits(single: Path, tmp_path: Path) -> None:
    done = run(command(*REQUESTED, "launch.threads_per_rank=2", f"hydra.run.dir={tmp_path / 'run'}"))
    assert done.returncode == 0, done.stderr
    assert record_of(tmp_path / "run").provenance.threads_per_rank == 2
    assert hashes(tmp_path / "run") == hashes(single)


@pytest.mark.slow
def test_more_replicas_than_images(single: Path, tmp_path: Path) -> None:
    overrides = ["request.prompt=red apple", "request.seed=6", "parallel=dp2", f"hydra.run.dir={tmp_path / 'run'}"]
    done = run(command(*overrides))
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "run")[6] == hashes(single)[6]


def test_one_rank_in_this_process_generates_the_same_bits(single: Path, tmp_path: Path) -> None:
    done = run(command(*REQUESTED, "launch.mode=inprocess", f"hydra.run.dir={tmp_path / 'run'}"))
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "run") == hashes(single)


@pytest.mark.slow
def test_a_torchrun_of_the_users_own_gives_the_same_record(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    done = run(command(*REQUESTED, "parallel=dp2", f"hydra.run.dir={ours}"))
    assert done.returncode == 0, done.stderr
    done = run(torchrun(2, *REQUESTED, "parallel=dp2", f"hydra.run.dir={theirs}"))
    assert done.returncode == 0, done.stderr
    assert status_of(theirs).state == "ok"
    assert (theirs / "logs" / "rank1.log").exists()
    assert (theirs / "config.yaml").read_text() == (ours / "config.yaml").read_text()
    left, right = (msgspec.to_builtins(record_of(folder)) for folder in (ours, theirs))
    for timed in ("first_call", "repeats", "summary"):
        assert left[timed].keys() == right[timed].keys() if isinstance(left[timed], dict) else True
    assert left["summary"]["nfe"] == right["summary"]["nfe"]
    assert len(left["repeats"]) == len(right["repeats"])
    for row in (left, right):
        row["overrides"] = [override for override in row["overrides"] if not override.startswith("hydra.")]
        for timed in ("first_call", "repeats", "summary"):
            del row[timed]
        for component in row["loaded"]:
            del component["load_ms"]
        for own in ("started", "ended", "command"):
            assert row["provenance"].pop(own)
        row["notes"] = [note for note in row["notes"] if "processors" not in note]  # how busy the machine was
    assert left == right
