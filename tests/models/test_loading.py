"""Where components come from, and what cannot be loaded: each in one line, before a process starts."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from harness.build.common import source_of
from harness.client.generator import DiffusionGenerator
from harness.engines.loader import slowest_load_times
from harness.messages import LoadedComponent
from harness.resolve.checkpoint import locate, models_of
from harness.resolve.compose import ConfigError, compose_run
from models.components import Components
from models.configs.libraries import expected_of_library
from models.configs.table import expected_tensors
from models.detect import matching_architectures
from models.files import read_header
from models.meta_init import build_empty
from models.pixart.components import load
from models.registry import ARCHITECTURES, PUBLISHED, REFERENCE
from models.tensors import read_stored
from models.text.load import load_encoder

EMOJI = REFERENCE / "emoji"
INPROCESS = ("launch.mode=inprocess", "launch.threads_per_rank=1", "logger=json")
NAMES = sorted(path.name for path in PUBLISHED.iterdir())
WEIGHTS = "diffusion_pytorch_model.safetensors"


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMOJI, tmp_path / "checkpoint"))


def sparse(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Write a safetensors file of the right size in which no byte of a tensor is on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with file.open("r+b") as opened:
        opened.truncate(8 + len(text) + end)
    return file


def shapes_of(config: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a published network, by its config.json."""
    folder, raw = config.parent, json.loads(config.read_text())
    architecture = next((name for name, row in ARCHITECTURES.items() if raw.get("_class_name") in row.classes), None)
    if raw.get("norm_type") == "ada_norm_single":
        architecture = "pixart"
    if raw.get("addition_embed_type") == "text_time":
        architecture = "sdxl"
    if architecture is not None and (shapes := expected_tensors(architecture, folder)) is not None:
        return shapes
    projected = raw.get("architectures") == ["CLIPTextModelWithProjection"]
    expected = expected_of_library(folder, projected)
    assert expected is not None
    return dict(expected)


def lookalike(name: str, folder: Path) -> Path:
    """Write a checkpoint in a published layout, whose tensors have sizes and no numbers; enough for a launcher."""
    shutil.copytree(PUBLISHED / name, folder)
    for config in folder.glob("*/config.json"):
        stem = "model" if config.parent.name.startswith("text") else "diffusion_pytorch_model"
        sparse(config.parent / f"{stem}.safetensors", shapes_of(config))
    index = json.loads((folder / "model_index.json").read_text())
    for part in (part for part in index if part.startswith("tokenizer") and index[part] != [None, None]):
        (folder / part).mkdir()
        (folder / part / "tokenizer.json").write_text("{}")
        (folder / part / "chat_template.jinja").touch()
    return folder


def loaded(*overrides: str) -> tuple[Components, dict[str, str]]:
    """Return the components of a configuration, and the dtype of each that was loaded."""
    source = source_of(compose_run(overrides), torch.device("cpu"))
    parts = load(source, torch.nn.functional.scaled_dot_product_attention)  # type: ignore[arg-type]
    parts.load_prompts()
    return parts, {name: part.dtype for name, part in source.loaded.items()}


def networks(*overrides: str) -> list[nn.Module]:
    """Return the denoiser, the VAE and the text encoder of a configuration."""
    parts, _ = loaded(*overrides)
    return [parts.network, parts.decoder.vae, parts.load_prompts().encoder]  # type: ignore[attr-defined]


def same(network: nn.Module, tensors: Mapping[str, torch.Tensor]) -> bool:
    return sorted(float(t.double().sum()) for t in network.state_dict().values()) == sorted(
        float(t.double().sum()) for t in tensors.values()
    )


# ---------------------------------------------------------------- one file


def test_one_file_of_a_shipped_model_keeps_the_other_components(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    tensors = load_file(EMOJI / "transformer" / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    parts, _ = loaded(f"model.path={file}")
    assert same(parts.network, {name: tensor + 1 for name, tensor in tensors.items()})


def test_one_file_inside_a_checkpoint_keeps_its_neighbours(copy: Path) -> None:
    file = copy / "transformer" / "other.safetensors"
    shutil.move(copy / "transformer" / WEIGHTS, file)
    composed = compose_run([f"model.path={file}"])
    place = locate(composed.config.model, "transformer")
    assert place.folder == copy
    assert place.files("transformer") == [file]


def test_one_file_of_an_unshipped_model_names_what_lacks_weights(tmp_path: Path) -> None:
    file = sparse(tmp_path / "flux.safetensors", shapes_of(PUBLISHED / "flux" / "transformer" / "config.json"))
    line = refused("model=flux", f"model.path={file}")
    given = {"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert all(f"model.{name}.path=PATH" in line for name in given)
    folder = lookalike("flux", tmp_path / "whole")
    paths = [f"model.{name}.path={folder / name}" for name in given]
    compose_run(["model=flux", f"model.path={file}", *paths])
    compose_run(["model=flux", f"model.denoiser.path={file}", *paths])
    line = refused("model=flux", f"model.path={file}", *(path for path in paths if "vae" not in path))
    assert "; vae lacks files: give model.vae.path=PATH, or" in line


def test_one_file_of_a_model_that_nobody_describes(tmp_path: Path) -> None:
    save_file({"one": torch.ones(1)}, tmp_path / "mine.safetensors")
    line = refused(f"model.path={tmp_path / 'mine.safetensors'}", "model.name=mine")
    assert "no configuration of model=mine is shipped" in line


def test_a_file_of_another_format_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "mine.ckpt").write_bytes(b"\x80\x04")
    assert "pickles never are" in refused(f"model.path={tmp_path / 'mine.ckpt'}")


# ---------------------------------------------------------------- components by name


@pytest.mark.slow
@pytest.mark.parametrize("as_file", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("name", ["vae", "denoiser", "text_encoder"])
def test_a_component_is_replaced(name: str, as_file: bool, tmp_path: Path) -> None:
    part = "transformer" if name == "denoiser" else name
    other = Path(shutil.copytree(EMOJI / part, tmp_path / "other"))
    file = next(other.glob("*.safetensors"))
    tensors = {key: tensor * 1.5 for key, tensor in load_file(file).items()}
    save_file(tensors, file)
    path = file
    if as_file:  # away from its config.json: it uses the checkpoint's own
        path = tmp_path / "alone.safetensors"
        shutil.move(file, path)
    found = networks(f"model.{name}.path={path if as_file else other}")
    for key, network, before in zip(("denoiser", "vae", "text_encoder"), found, networks(), strict=True):
        ratio = next(network.parameters()) / next(before.parameters())
        assert float(ratio.nanmedian()) == pytest.approx(1.5 if key == name else 1.0)


def test_a_file_beside_a_config_is_described_by_it(tmp_path: Path) -> None:
    vae = Path(shutil.copytree(EMOJI / "vae", tmp_path / "vae"))
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    parts, _ = loaded(f"model.vae.path={vae / WEIGHTS}")
    assert parts.decoder.vae.config.scaling_factor == 0.5


def test_a_tokenizer_is_replaced(tmp_path: Path) -> None:
    other = Path(shutil.copytree(EMOJI / "tokenizer", tmp_path / "tokenizer"))
    content = json.loads((other / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "rocket"}, "content": "panda"}
    (other / "tokenizer.json").write_text(json.dumps(content))
    parts, _ = loaded(f"model.tokenizer.path={other}")
    encoder = parts.load_prompts()
    assert torch.equal(encoder(["rocket"]).require_prompt_embeds(), encoder(["panda"]).require_prompt_embeds())
    assert "give the folder of a tokenizer" in refused(f"model.tokenizer.path={other / 'tokenizer.json'}")


def test_each_component_has_a_dtype() -> None:
    assert loaded("model.dtype=bfloat16")[1] == {
        "transformer": "bfloat16",
        "vae": "float32",
        "text_encoder": "bfloat16",
    }
    parts, dtypes = loaded("model.vae.dtype=bfloat16", "model.text_encoder.dtype=bfloat16")
    assert dtypes == {"transformer": "float32", "vae": "bfloat16", "text_encoder": "bfloat16"}
    assert next(parts.decoder.vae.parameters()).dtype == torch.bfloat16
    assert {p.dtype for p in parts.network.parameters()} == {torch.float32}
    parts, dtypes = loaded("model.denoiser.dtype=bfloat16")
    assert dtypes == {"transformer": "bfloat16", "vae": "float32", "text_encoder": "float32"}
    assert {p.dtype for p in parts.network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "model.text_encoder_2.path=/tmp",
            "no text_encoder_2; it has denoiser, vae, text_encoder, tokenizer",
        ),
        ("model.text_encoder_3.dtype=bfloat16", "pixart has no text_encoder_3"),
        ("model.tokenizer_2.path=/tmp", "pixart has no tokenizer_2"),
        ("model.tokenizer.dtype=float32", "tokenizer has no weights"),
        ("model.vae.path=/no/such", "model.vae.path=/no/such: no such folder or file"),
        ("model.revision=main", "is no hub name"),
    ],
)
def test_a_key_without_an_effect_is_refused(override: str, says: str) -> None:
    assert says in refused(override)


def test_the_record_says_what_was_loaded(tmp_path: Path) -> None:
    overrides = [*INPROCESS, "model.vae.dtype=bfloat16", "request.steps=1", "request.prompt=rocket"]
    with DiffusionGenerator.from_config(*overrides) as generator:
        record = generator.generate().record
    rows = {row.component: row for row in record.loaded}
    assert rows.keys() == {"transformer", "vae", "text_encoder"}
    for name, row in rows.items():
        stored = read_header(next((EMOJI / name).glob("*.safetensors")))[0]
        width = 2 if name == "vae" else 4
        assert row.parameters == sum(int(torch.Size(tensor.shape).numel()) for tensor in stored.values())
        assert row.bytes == width * row.parameters
        assert row.dtype == ("bfloat16" if name == "vae" else "float32")
        assert row.path == str(EMOJI / name)
        assert 0 < row.load_ms < record.first_call.load_ms


def test_every_rank_counts_and_the_slowest_is_reported() -> None:
    def part(name: str, ms: float) -> LoadedComponent:
        return LoadedComponent(name, "a", "float32", 1, 4, ms)

    ranks = [[part("vae", 1.0), part("transformer", 5.0)], [part("vae", 3.0), part("transformer", 2.0)]]
    assert slowest_load_times(ranks) == [part("vae", 3.0), part("transformer", 5.0)]


# ---------------------------------------------------------------- foreign folders


@pytest.mark.parametrize("name", NAMES)
def test_a_published_checkpoint_is_recognised(name: str, tmp_path: Path) -> None:
    folder = lookalike(name, tmp_path / name)
    composed = compose_run([f"model={name}", f"model.path={folder}"])
    denoiser = next(iter(composed.config.model.checkpoint_defaults.values())).weights
    assert matching_architectures(folder, denoiser) == [composed.config.model.architecture]


def test_every_architecture_has_models() -> None:
    assert all(models_of(architecture) for architecture in ARCHITECTURES)


@pytest.mark.parametrize(
    ("folder", "requested", "fits"),
    [
        ("sd3", "flux", "sd3"),
        ("flux", "sd3", "flux"),
        ("sdxl", "sd15", "sdxl"),
        ("sd15", "sdxl", "sd15"),
        ("sdxl", "flux", "sdxl"),
        ("pixart_sigma", "dit_256", "pixart_sigma"),
        ("dit_256", "pixart_alpha", "dit_256"),
        ("z_image", "qwen_image", "z_image"),
        ("wan_1_3b", "z_image", "wan_1_3b"),
        ("ddpm_cifar10", "sd15", "ddpm_cifar10"),
        ("sd15", "ddpm_cifar10", "sd15"),
    ],
)
def test_a_foreign_checkpoint_names_the_model_that_fits(folder: str, requested: str, fits: str, tmp_path: Path) -> None:
    line = refused(f"model={requested}", f"model.path={lookalike(folder, tmp_path / folder)}")
    index = json.loads((PUBLISHED / folder / "model_index.json").read_text())
    assert f"a checkpoint of {index['_class_name']}" in line
    assert f"model={fits}" in line.partition("; use ")[2].split(" ")
    assert f"model={requested} (" in line


def test_a_checkpoint_of_an_unsupported_pipeline(tmp_path: Path) -> None:
    folder = lookalike("flux", tmp_path / "flux")
    (folder / "transformer" / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')
    (folder / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    line = refused("model=flux", f"model.path={folder}")
    assert "a checkpoint of CogVideoXPipeline (CogVideoXTransformer3DModel)" in line
    assert "no model here uses it" in line


def test_a_component_is_no_checkpoint(copy: Path, tmp_path: Path) -> None:
    line = refused(f"model.path={copy / 'transformer'}")
    assert "one component (PixArtTransformer2DModel), not a checkpoint" in line
    assert f"give model.path={copy}, or" in line
    assert "one component (T5EncoderModel)" in refused(f"model.path={copy / 'text_encoder'}")
    alone = Path(shutil.copytree(copy / "vae", tmp_path / "alone" / "vae"))
    assert "give the checkpoint's folder" in refused(f"model.path={alone}")


def test_a_denoiser_of_another_class_does_not_replace(tmp_path: Path) -> None:
    line = refused(f"model.denoiser.path={lookalike('flux', tmp_path / 'flux') / 'transformer'}")
    assert "_class_name=FluxTransformer2DModel; this model needs PixArtTransformer2DModel" in line


def test_a_vae_of_another_class_does_not_replace(tmp_path: Path) -> None:
    line = refused(f"model.vae.path={lookalike('wan_1_3b', tmp_path / 'wan') / 'vae'}")
    assert "config.json says _class_name=AutoencoderKLWan; this model needs AutoencoderKL" in line


# ---------------------------------------------------------------- missing and broken files


def test_all_missing_components_are_named(copy: Path) -> None:
    shutil.rmtree(copy / "vae")
    shutil.rmtree(copy / "tokenizer")
    line = refused(f"model.path={copy}")
    assert "no vae/, no tokenizer/ here; expected the folders transformer, vae, text_encoder, tokenizer" in line


def shards(folder: Path, count: int = 3) -> list[Path]:
    """Split a component's weights into several files."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    files = [folder / f"{file.stem}-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    for n, path in enumerate(files):
        save_file({name: tensors[name] for name in names[n::count]}, path)
    index = {"weight_map": {name: files[n % count].name for n, name in enumerate(names)}}
    (folder / f"{file.stem}.safetensors.index.json").write_text(json.dumps(index))
    return files


@pytest.mark.slow
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_shards_are_whole_or_refused(copy: Path, part: str) -> None:
    files = shards(copy / part)
    for network, whole in zip(networks(f"model.path={copy}"), networks(), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(network.parameters(), whole.parameters(), strict=True))
    data = files[1].read_bytes()
    files[1].write_bytes(data[:-1])
    assert f"{files[1]}: {len(data) - 1} bytes where its header promises {len(data)}" in refused(f"model.path={copy}")
    files[1].unlink()
    assert f"shard {files[1].name} is named by" in refused(f"model.path={copy}")
    files[2].unlink()
    assert "(nor are 1 more)" in refused(f"model.path={copy}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int32], ids=str)
def test_quantised_weights_are_refused(copy: Path, dtype: torch.dtype) -> None:
    tensors = load_file(copy / "transformer" / WEIGHTS)
    tensors["proj_out.weight"] = torch.zeros(4, 4).to(dtype)
    save_file(tensors, copy / "transformer" / WEIGHTS)
    line = refused(f"model.path={copy}")
    assert "proj_out.weight is stored as" in line
    assert "quantised weights are not read here" in line


def test_a_quantised_config_is_refused(copy: Path) -> None:
    config = json.loads((copy / "transformer" / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (copy / "transformer" / "config.json").write_text(json.dumps(quantised))
    assert "quantised weights (quantization_config)" in refused(f"model.path={copy}")


def test_positions_that_old_text_encoders_carry_are_no_fault(tmp_path: Path) -> None:
    """CLIP's published files hold position_ids, whole numbers, which transformers leaves out."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from models.checkpoint_source import CheckpointSource

    config = CLIPTextConfig(
        vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    encoder = CLIPTextModel(config)
    encoder.save_pretrained(tmp_path / "text_encoder")
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    found = load_encoder(CheckpointSource(tmp_path), "text_encoder", CLIPTextModel, CLIPTextConfig)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), encoder.parameters(), strict=True))


def test_a_tensor_in_two_shards_is_refused(copy: Path) -> None:
    files = shards(copy / "transformer")
    tensors = load_file(files[0])
    save_file({**load_file(files[1]), next(iter(tensors)): next(iter(tensors.values()))}, files[1])
    assert f"{next(iter(tensors))} is in {files[0].name} too" in refused(f"model.path={copy}")


@pytest.mark.parametrize("bad", ["../elsewhere.safetensors", "/etc/passwd", 7])
def test_an_index_names_files_of_its_own_folder(copy: Path, bad: object) -> None:
    shards(copy / "transformer")
    index = copy / "transformer" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": bad}}))
    assert "is not a file in the folder of the index" in refused(f"model.path={copy}")


@pytest.mark.parametrize(
    "change",
    [{"data_offsets": [4, 8]}, {"data_offsets": [-4, 8], "shape": [3]}, {"shape": [3]}, {"shape": [-2]}],
)
def test_a_header_that_lies_is_refused(copy: Path, change: dict[str, object]) -> None:
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}
    text = json.dumps(header).encode()
    (copy / "transformer" / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert "the bytes of a are not a F32" in refused(f"model.path={copy}")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.ckpt"])
def test_a_pickle_is_never_read(copy: Path, name: str) -> None:
    (copy / "transformer" / WEIGHTS).rename(copy / "transformer" / name)
    line = refused(f"model.path={copy}")
    assert f"there is {name}, a pickle, and pickles are never read" in line
    assert "save_pretrained" in line


def test_a_variant_is_pointed_at(copy: Path) -> None:
    (copy / "vae" / WEIGHTS).rename(copy / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert "there is diffusion_pytorch_model.fp16.safetensors: give that file" in refused(f"model.path={copy}")
    compose_run([f"model.path={copy}", f"model.vae.path={copy / 'vae' / 'diffusion_pytorch_model.fp16.safetensors'}"])


def test_a_tokenizer_without_its_files_lists_them(copy: Path) -> None:
    (copy / "tokenizer" / "tokenizer.json").unlink()
    line = refused(f"model.path={copy}")
    assert "no tokenizer files here; expected tokenizer.json, or vocab.json and merges.txt, or spiece.model" in line
    compose_run([f"model.path={copy}", f"model.tokenizer.path={EMOJI / 'tokenizer'}"])


@pytest.mark.parametrize("installed", [False, True])
def test_a_sentencepiece_model_says_what_reads_it(copy: Path, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "tokenizer" / "tokenizer.json").rename(copy / "tokenizer" / "spiece.model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    if installed:
        compose_run([f"model.path={copy}"])
    else:
        assert "spiece.model needs the package sentencepiece: pip install" in refused(f"model.path={copy}")


def test_an_empty_folder_lists_what_is_expected(tmp_path: Path) -> None:
    line = refused(f"model.path={tmp_path}")
    assert "no transformer/, no vae/, no text_encoder/, no tokenizer/ here" in line


def test_names_and_shapes_of_every_kind_come_in_one_message(copy: Path) -> None:
    """Before any process starts."""
    file = copy / "vae" / WEIGHTS
    tensors = load_file(file)
    del tensors["decoder.conv_in.bias"]
    save_file({**tensors, "stranger": torch.zeros(1), "decoder.conv_out.bias": torch.zeros(9)}, file)
    line = refused(f"model.path={copy}")
    assert "\n" not in line
    assert line.startswith(str(copy / "vae"))
    assert "missing decoder.conv_in.bias" in line
    assert "unexpected stranger" in line
    assert "decoder.conv_out.bias is (9,), the network has (3,)" in line


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_of_many_pieces_is_itself(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.randn(7, 11, 13, generator=generator).to(stored),
        "large": torch.randn(601, 1009, generator=generator).to(stored),
        "none": torch.zeros(0, 3).to(stored),
        "one": torch.tensor(2.5).to(stored),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")[0]
    for name, tensor in tensors.items():
        assert torch.equal(read_stored(header[name], wanted), tensor.to(wanted))
        assert torch.equal(read_stored(header[name]), tensor)


def test_building_touches_no_memory() -> None:
    """A network of 400 MB that is never written takes no memory."""

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])

    before = resident()
    network = build_empty(lambda: nn.Sequential(*(nn.Linear(3000, 3000) for _ in range(11))), torch.float32)
    assert resident() - before < 0.05 * sum(4 * p.numel() for p in network.parameters())
