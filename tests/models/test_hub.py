"""Hub names: the launcher fetches them, and every rank finds them in the local cache. No test uses a network."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from harness.config.schema import Load
from harness.records.record import read_record
from harness.resolve.checkpoint import _wanted, locate
from harness.resolve.compose import ConfigError, compose_run
from models import hub
from models.registry import REFERENCE

EMOJI = REFERENCE / "emoji"
NAME = "someone/emoji"
MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a hub cache with two commits of one checkpoint: `main`, and an older one with the tag `v1`."""
    root = tmp_path / "hub"
    repository = root / "models--someone--emoji"
    (repository / "refs").mkdir(parents=True)
    for name, commit in (("main", MAIN), ("v1", OLD)):
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(EMOJI, repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return root


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, MAIN), ("main", MAIN), ("v1", OLD), (OLD, OLD)], ids=["none", "main", "tag", "hash"]
)
def test_a_name_is_a_folder_of_the_cache(cache: Path, revision: str | None, commit: str) -> None:
    given = [] if revision is None else [f"model.revision={revision}"]
    config = compose_run([f"model.path={NAME}", *given]).config
    assert config.model.path == NAME, "the configuration keeps what the user wrote"
    folder = locate(config.model, "transformer").folder
    assert folder == cache / "models--someone--emoji" / "snapshots" / commit
    assert hub.commit(folder) == commit
    assert hub.commit(EMOJI) is None


def test_hub_is_the_name_that_the_model_states(cache: Path) -> None:
    config = compose_run(["model.path=hub", f"model.hub={NAME}"]).config
    assert hub.commit(locate(config.model, "transformer").folder) == MAIN
    assert "model.path=hub: no such folder or file" in refused("model.path=hub")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["model.path=someone/else"],
            "someone/else: no such folder here, not in the hub's local cache, and the hub can",
        ),
        ([f"model.path={NAME}", "model.revision=v2"], "not in the hub's local cache at revision v2"),
        (["model.path=a/b/c"], "model.path=a/b/c: no such folder or file"),
        (["model.path=/someone/emoji"], "no such folder or file"),
        (["model.path=some..one/emoji--x"], "cannot be reached"),
        (["model.revision=v1"], "model.revision=v1 has no effect: model.path=None is no hub name"),
        (["model=flux", "model.hub=org/flux"], "or its hub name: model.path=org/flux"),
    ],
)
def test_a_name_that_is_not_there_is_refused(cache: Path, overrides: list[str], says: str) -> None:
    assert says in refused(*overrides)


def test_a_folder_comes_before_a_name(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EMOJI, tmp_path / NAME)
    assert locate(compose_run([f"model.path={NAME}"]).config.model, "transformer").folder == Path(NAME)


def test_a_snapshot_that_lacks_a_file_is_refused(cache: Path) -> None:
    shutil.rmtree(cache / "models--someone--emoji" / "snapshots" / MAIN / "vae")
    assert "no vae/ here" in refused(f"model.path={NAME}")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("GatedRepoError", "licence must be accepted first: do so on huggingface.co/someone/new"),
        ("RepositoryNotFoundError", "no such name on the hub"),
        ("RevisionNotFoundError", "the hub has no revision v3"),
        ("HfHubHTTPError", "the hub could not be reached (first line)"),
    ],
)
def test_what_the_hub_answers_is_one_line(error: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = getattr(huggingface_hub.errors, error)

    def answer(*args: object, **kwargs: object) -> None:
        raised = kind.__new__(kind)
        raised.args = ("first line\nsecond line",)
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    assert says in refused("model.path=someone/new", "model.revision=v3")


def test_only_the_launcher_asks_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    requested = []

    def answer(name: str, **kwargs: object) -> str:
        requested.append((name, kwargs["revision"], kwargs["local_files_only"]))
        return str(EMOJI)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    config = compose_run([f"model.path={NAME}"]).config
    assert requested == [(NAME, None, False)], "the checks locate the checkpoint once"
    locate(config.model, "transformer")
    assert requested[1:] == [(NAME, None, True)]


def test_a_launcher_checks_a_checkpoint_without_torch(cache: Path, tmp_path: Path) -> None:
    """A hub name and a LoRA are checked down to names and shapes."""
    lora = {f"transformer.proj_out.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}
    save_file(lora, tmp_path / "a.safetensors")
    overrides = [f"model.path={NAME}", f"model.lora=[{{path: {tmp_path / 'a.safetensors'}}}]"]
    code = (
        "import sys\nfrom harness.resolve.compose import ConfigError, compose_run\n"
        f"try:\n    compose_run({overrides!r})\nexcept ConfigError as error:\n    print(error)\n"
        "print([m for m in ('torch', 'transformers', 'diffusers') if m in sys.modules])"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    refusal, modules = done.stdout.splitlines()
    assert "the LoRA does not fit the network: proj_out.weight is (" in refusal
    assert modules == "[]"


FLUX = [
    "README.md",
    "ae.safetensors",
    "flux1-dev.safetensors",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/spiece.model",
    "tokenizer_2/tokenizer.json",
    "tokenizer_2/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00003.safetensors",
    "transformer/diffusion_pytorch_model-00003-of-00003.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
EXTRA = [
    "transformer/diffusion_pytorch_model.bin",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "vae/diffusion_pytorch_model.ckpt",
    "vae/flax_model.msgpack",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.onnx",
    "text_encoder_3/model.safetensors",
    "safety_checker/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "dev_grid.jpg",
]


def fetched(load: Load, replaced: Sequence[str] = ()) -> set[str]:
    """Return which files of FLUX's checkpoint a run would fetch."""
    model = replace(compose_run(["model=flux", "model.load=dummy"]).config.model, load=load)
    patterns = _wanted(model, "transformer", {name: Path("elsewhere") for name in replaced})
    return {name for name in (*FLUX, *EXTRA) if any(fnmatch(name, pattern) for pattern in patterns)}


def test_only_what_is_read_is_fetched() -> None:
    whole = set(FLUX) - {"README.md", "ae.safetensors", "flux1-dev.safetensors"}
    assert fetched(Load.checkpoint) == whole
    assert fetched(Load.checkpoint, ["vae"]) == whole - {"vae/diffusion_pytorch_model.safetensors"}
    assert fetched(Load.dummy) == {name for name in whole if not name.endswith(".safetensors")}


@pytest.mark.slow
def test_ranks_find_what_the_launcher_found(cache: Path, tmp_path: Path) -> None:
    """A whole run from the command line, two ranks, offline; the record names the commit."""
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    overrides = [f"model.path={NAME}", "model.revision=v1", "request.steps=1", "request.prompt=rocket", "logger=json"]
    command = [sys.executable, "-m", "harness", *overrides, "parallel=dp2", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_record(tmp_path / "run")
    assert record is not None
    folder = cache / "models--someone--emoji" / "snapshots" / OLD
    assert f"model.path={NAME} is commit {OLD}, in {folder}" in record.notes
    assert {row.path for row in record.loaded} == {str(folder / row.component) for row in record.loaded}
    assert record.config["model"]["path"] == NAME
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "ok"
