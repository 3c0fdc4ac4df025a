"""Broken, foreign and misplaced files of a checkpoint are refused in one line, before a process starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.resolve.checkpoint import locate
from harness.resolve.compose import ConfigError, compose_run
from models.checkpoint_source import CheckpointSource
from models.files import CheckpointError
from models.pixart import load_denoiser
from models.registry import REFERENCE
from tests.fixtures.models import flux, sd3, unet, z_image
from tests.fixtures.models.wan import tiny_wan

EMOJI = REFERENCE / "emoji"
WEIGHTS = "diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 334707217\n"


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMOJI, tmp_path / "checkpoint"))


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite the tensors of a file."""
    save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def configure(folder: Path, **options: object) -> None:
    """Change options of a component's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


# ---------------------------------------------------------------- files that are something else


@pytest.mark.parametrize(
    "name",
    [
        f"transformer/{WEIGHTS}",
        "text_encoder/model.safetensors",
        "vae/config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_pointer_of_git_lfs_says_what_fetches_the_file(name: str, copy: Path) -> None:
    (copy / name).write_text(POINTER)
    assert f"{copy / name}: a pointer of git-lfs, not the file; run `git lfs pull` in its folder" in refused(
        f"model.path={copy}"
    )


def test_a_lora_that_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text(POINTER)
    assert "run `git lfs pull`" in refused(f"model.lora=[{{path: {tmp_path / 'a.safetensors'}}}]")


def test_a_pickle_in_place_of_a_component(copy: Path) -> None:
    (copy / "vae" / "model.bin").write_bytes(b"\x80\x04\x95" + bytes(64))
    line = refused(f"model.path={copy}", f"model.vae.path={copy / 'vae' / 'model.bin'}")
    assert "model.bin: a pickle, and pickles are never read" in line


def test_a_truncated_file(copy: Path) -> None:
    file = copy / "vae" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file}: " in refused(f"model.path={copy}")
    file.write_bytes(b"")
    assert "its header does not fit its 0 bytes" in refused(f"model.path={copy}")


def test_an_index_that_lists_nothing(copy: Path) -> None:
    index = copy / "transformer" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {}}))
    assert f"{index}: it lists no tensor (weight_map is empty)" in refused(f"model.path={copy}")


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("diffusion_pytorch_model.fp16.safetensors.index.json", "diffusion_pytorch_model.fp16-{}-of-00002.safetensors"),
        ("model.safetensors.index.fp16.json", "model.fp16-{}-of-00002.safetensors"),
    ],
)
def test_shards_of_a_variant_are_pointed_at_and_read(index: str, shard: str, copy: Path) -> None:
    folder = copy / "transformer"
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = [folder / shard.format(f"{n + 1:05}") for n in range(2)]
    names = sorted(tensors)
    for n, file in enumerate(files):
        save_file({name: tensors[name] for name in names[n::2]}, file)
    weight_map = {name: files[n % 2].name for n, name in enumerate(names)}
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    assert f"no weights here; expected {WEIGHTS} or model.safetensors; there is {index}: give that file" in refused(
        f"model.path={copy}"
    )
    composed = compose_run([f"model.path={copy}", f"model.denoiser.path={folder / index}"])
    assert locate(composed.config.model, "transformer").files("transformer") == files
    source = CheckpointSource(copy, replaced={"transformer": folder / index})
    ours, theirs = load_denoiser(source), load_denoiser(CheckpointSource(EMOJI))
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    files[1].unlink()
    assert f"shard {files[1].name} is named by {index} but is not there" in refused(
        f"model.path={copy}", f"model.denoiser.path={folder / index}"
    )


def test_a_link_into_the_hubs_cache_keeps_its_neighbours(tmp_path: Path) -> None:
    """The hub's cache holds links from snapshots to files whose names are hashes, without an ending."""
    repository = tmp_path / "models--someone--emoji"
    (repository / "blobs").mkdir(parents=True)
    snapshot = Path(shutil.copytree(EMOJI, repository / "snapshots" / "0123"))
    for number, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:064x}"
        file.rename(blob)
        file.symlink_to(blob)
    file = snapshot / "transformer" / WEIGHTS
    composed = compose_run([f"model.path={file}", "model.name=mine"])
    layout = locate(composed.config.model, "transformer")
    assert layout.folder == snapshot
    assert layout.files("transformer") == [file]
    compose_run([f"model.path={snapshot}", f"model.vae.path={snapshot / 'vae' / WEIGHTS}"])


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_number_that_is_none_is_refused_as_it_is_read(value: float, dtype: torch.dtype, copy: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        tensors["proj_out.weight"][3, 5] = value
        return tensors

    edit(copy / "transformer" / WEIGHTS, spoil)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: proj_out.weight holds NaN or infinity"):
        load_denoiser(CheckpointSource(copy))


def test_large_numbers_are_no_fault(copy: Path) -> None:
    """Their sum in float16 is infinite; none of them is."""

    def enlarge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
        tensors["proj_out.weight"].fill_(60_000.0)
        return tensors

    edit(copy / "transformer" / WEIGHTS, enlarge)
    assert torch.all(load_denoiser(CheckpointSource(copy)).project_out.weight == 60_000.0)


# ---------------------------------------------------------------- names and sizes


def test_the_denoisers_names_and_shapes_are_compared_before_ranks_start(copy: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["caption_projection.linear_1.bias"]
        return tensors | {"stranger": torch.zeros(1), "proj_out.bias": torch.zeros(3)}

    file = copy / "transformer" / WEIGHTS
    edit(file, change)
    line = refused(f"model.path={copy}")
    assert f"{file.parent} (sizes of {file.parent / 'config.json'}): the weights do not fit the network: " in line
    assert "missing caption_projection.linear_1.bias; proj_out.bias is (3,), the network has (16,)" in line
    assert "unexpected stranger" in line


def test_a_config_of_other_weights(copy: Path) -> None:
    configure(copy / "transformer", num_layers=5)
    assert "unexpected transformer_blocks.5.attn1.to_k.bias" in refused(f"model.path={copy}")
    shutil.copy(EMOJI / "transformer" / "config.json", copy / "transformer")
    configure(copy / "text_encoder", num_layers=9)
    line = refused(f"model.path={copy}")
    assert f"{copy / 'text_encoder'}: the weights do not fit the network: the number of layers is " in line
    shutil.copy(EMOJI / "text_encoder" / "config.json", copy / "text_encoder")
    configure(copy / "text_encoder", vocab_size=77)
    assert "the embedding of tokens is (" in refused(f"model.path={copy}")
    shutil.copy(EMOJI / "text_encoder" / "config.json", copy / "text_encoder")
    configure(copy / "vae", latent_channels=16)
    assert "decoder.conv_in.weight is (" in refused(f"model.path={copy}")


def test_an_option_that_the_network_lacks(copy: Path) -> None:
    configure(copy / "transformer", attention_type="gated")
    line = refused(f"model.path={copy}")
    assert (
        f"{copy / 'transformer' / 'config.json'}: attention_type=gated is not supported; only attention_type=" in line
    )
    configure(copy / "transformer", attention_type="default", patch_size="two")
    assert "no whole number under patch_size" in refused(f"model.path={copy}")
    assert "no whole number under patch_size" in refused(f"model.path={copy}", "model.load=dummy")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("sd15", {"num_class_embeds": 7}, "num_class_embeds=7 is not supported (it is conditioned on classes)"),
        ("sd15", {"in_channels": 9}, "in_channels=9 and out_channels=4; networks for inpainting"),
        ("sd15", {"addition_embed_type": "text_time"}, "addition_embed_type=text_time; use model.architecture=sdxl"),
    ],
)
def test_an_option_that_no_unet_here_has(name: str, options: dict[str, object], says: str, tmp_path: Path) -> None:
    unet.sd(name).save_pretrained(tmp_path)
    configure(tmp_path / "unet", **options)
    assert f"{tmp_path / 'unet' / 'config.json'}: {says}" in refused(f"model={name}", f"model.path={tmp_path}")
    configure(tmp_path / "unet", **(dict.fromkeys(options) | {"in_channels": 4}))
    compose_run([f"model={name}", f"model.path={tmp_path}"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("SASolverScheduler", "SASolverScheduler is not supported: stochastic Adams steps"),
        ("EulerScheduler", "unknown class 'EulerScheduler'; did you mean 'EDMEulerScheduler'?"),
        (None, "needs _class_name, as in diffusers' scheduler_config.json"),
    ],
)
def test_a_noise_scheduler_that_is_not_supported(name: str | None, says: str, copy: Path) -> None:
    (copy / "scheduler").mkdir(exist_ok=True)
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": name}))
    line = refused(f"model.path={copy}", "scheduler=published")
    assert line.startswith(f"{file}: ")
    assert says in line
    compose_run([f"model.path={copy}"])


# ---------------------------------------------------------------- other layouts


SAVE = {
    "flux": lambda folder: flux.checkpoint(folder, distilled=True),
    "sd3": lambda folder: sd3.checkpoint(folder, medium=False),
    "wan_1_3b": lambda folder: tiny_wan().save_pretrained(folder),
    "z_image_turbo": z_image.save,
    "sd15": lambda folder: unet.sd("sd15").save_pretrained(folder),
}


@pytest.mark.parametrize(
    ("model", "part", "name", "says"),
    [
        ("flux", "transformer", "double_blocks.0.img_attn.qkv.weight", "the layout of Black Forest Labs"),
        ("sd3", "transformer", "joint_blocks.0.x_block.attn.qkv.weight", "the layout of Stability AI"),
        ("wan_1_3b", "transformer", "blocks.0.self_attn.q.weight", "the layout of Wan's own code"),
        ("z_image_turbo", "transformer", "layers.0.attention.qkv.weight", "the layout of Z-Image's own code"),
        ("sd15", "unet", "input_blocks.0.0.weight", "the layout of latent diffusion (LDM)"),
        ("sd15", "unet", "model.diffusion_model.input_blocks.0.0.weight", "a whole model in one file, with model.diff"),
        ("sd15", "vae", "decoder.up.0.block.0.conv1.weight", "the layout of latent diffusion (LDM)"),
    ],
)
def test_another_layout_is_called_by_its_name(model: str, part: str, name: str, says: str, tmp_path: Path) -> None:
    SAVE[model](tmp_path)
    small = ["request.height=48", "request.width=32"] if model == "sd3" else []  # it has no positions for more
    compose_run([f"model={model}", f"model.path={tmp_path}", *small])
    file = tmp_path / part / WEIGHTS
    save_file({name: torch.zeros(1), "cond_stage_model.a": torch.zeros(1)}, file)
    line = refused(f"model={model}", f"model.path={tmp_path}")
    kind = json.loads((file.parent / "config.json").read_text())["_class_name"]
    assert f"{file.parent}: {says}" in line
    assert f"convert it once: diffusers.{kind}.from_single_file(FILE).save_pretrained(DIR), and give DIR" in line


def test_a_wrapper_in_front_of_every_name(copy: Path) -> None:
    edit(copy / "transformer" / WEIGHTS, lambda tensors: {f"module.{name}": t for name, t in tensors.items()})
    line = refused(f"model.path={copy}")
    assert "every name has module. in front (module.adaln_single.emb.timestep_embedder.linear_1.bias)" in line
