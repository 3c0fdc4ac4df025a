"""The exported folder: diffusers' own pipeline loads it, and its weights are the trained ones in bfloat16."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import PreTrainedTokenizerFast

from harness.config.train import DenoiserConfig, TextConfig, VaeConfig
from harness.tasks.train import captions, denoiser, export, text, vae
from harness.tasks.train.folder import CaptionedImage
from harness.tasks.train.objective import objective
from models.checkpoint_source import CheckpointSource
from models.components import Conditioning
from models.pixart import load_denoiser
from schedulers.build import build as build_noise_scheduler
from schedulers.compatibility import NoiseSchedulerSettings

DENOISER = DenoiserConfig(width=32, depth=1, heads=2, text_channels=32)
TEXT = TextConfig(vocabulary=400, width=32, depth=1, heads=2, hidden=32)
ROWS = [
    CaptionedImage(f"{name}-{style}.png", name, style, ("fruit",), captions.caption(name, style), "MIT", name != "pear")
    for name in ("red apple", "pear", "lemon")
    for style in ("noto", "3d")
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return text.build_tokenizer(ROWS, ["word", "words", "sword"], TEXT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    trained, target = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    text.build_encoder(TEXT, tokenizer).save_pretrained(trained / "text_encoder")
    tokenizer.save_pretrained(trained / "tokenizer")
    export.export_parts(target, vae.build(VaeConfig(channels=[8, 8, 16]), 64), trained, ROWS)
    model = denoiser.build(DENOISER)
    torch.nn.init.normal_(model.project_out.weight)
    for family in ("rectified_flow", "ddpm", "sgm"):
        export.export_transformer(target, model.state_dict(), model.config, family)
        export.export_noise_scheduler(target, objective(DENOISER, NoiseSchedulerSettings(family)).settings)
    return target


def test_diffusers_generates_from_the_folder_what_this_network_predicts(folder: Path) -> None:
    pipeline = PixArtSigmaPipeline.from_pretrained(folder, dtype=torch.float32, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "use_resolution_binning": False, "clean_caption": False}
    image = pipeline("red apple, 3d", generator=torch.Generator().manual_seed(0), **options).images[0]
    assert image.size == (64, 64)
    latent, tau = torch.randn(2, 4, 16, 16), torch.tensor([250.0, 750.0])
    states, mask = text.encode(pipeline.text_encoder, pipeline.tokenizer, ["red apple, 3d", "lemon"])
    with torch.no_grad():
        ours = load_denoiser(CheckpointSource(folder))(latent, tau, Conditioning(states, mask.bool()))
        theirs = pipeline.transformer(
            latent, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=tau, added_cond_kwargs={}
        ).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_folder_without_rectified_flow_is_still_one_of_diffusers(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    export.copy_parts(target, folder, ROWS)
    assert not (target / "transformer").exists()
    for name in ("transformer_ddpm", "scheduler_ddpm"):
        shutil.copytree(folder / name, target / name)
    network = PixArtTransformer2DModel.from_pretrained(target, subfolder="transformer_ddpm", low_cpu_mem_usage=False)
    steps = DDIMScheduler.from_pretrained(target, subfolder="scheduler_ddpm")
    pipeline = PixArtSigmaPipeline.from_pretrained(
        target, transformer=network, scheduler=steps, dtype=torch.float32, low_cpu_mem_usage=False
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("lemon", num_inference_steps=2, use_resolution_binning=False, clean_caption=False).images[0]
    assert image.size == (64, 64)


def test_the_shared_parts_of_the_model_itself_are_left_alone(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    export.copy_parts(folder, folder, [])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_diffusers_walks_the_same_grid_as_this_project(folder: Path) -> None:
    ours = build_noise_scheduler(objective(DENOISER, NoiseSchedulerSettings("ddpm")).settings)
    ddim = DDIMScheduler.from_pretrained(folder, subfolder="scheduler_ddpm")
    ddim.set_timesteps(7)
    assert ours.timesteps(7).tolist() == ddim.timesteps.tolist()
    ours = build_noise_scheduler(objective(DENOISER, NoiseSchedulerSettings("sgm")).settings)
    edm = EDMEulerScheduler.from_pretrained(folder, subfolder="scheduler_sgm")
    edm.set_timesteps(7)
    torch.testing.assert_close(ours.sigmas(7).float(), edm.sigmas, rtol=1e-5, atol=1e-6)


def test_the_published_edm_scheduler_reads_the_output_as_it_was_trained(folder: Path) -> None:
    ours = build_noise_scheduler(objective(DENOISER, NoiseSchedulerSettings("sgm")).settings)
    edm = EDMEulerScheduler.from_pretrained(folder, subfolder="scheduler_sgm")
    x, output, point = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), ours.grid(5)[2]
    found = edm.precondition_outputs(x, output, torch.tensor(point.sigma))
    torch.testing.assert_close(ours.prediction.estimate(output, x, point).x0, found, rtol=1e-5, atol=1e-5)
    fed = edm.precondition_inputs(x, torch.tensor(point.sigma))
    torch.testing.assert_close(point.c_in * x, fed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        NoiseSchedulerSettings("rectified_flow", "v"),
        NoiseSchedulerSettings("sgm", "eps"),
        NoiseSchedulerSettings("ddpm", spacing="karras"),
    ],
)
def test_what_diffusers_has_no_name_for_is_refused(settings: NoiseSchedulerSettings) -> None:
    with pytest.raises(ValueError, match="diffusers"):
        export.to_diffusers(objective(DENOISER, settings).settings)


def test_word_lists_hold_the_vocabulary(folder: Path) -> None:
    assert (folder / "vocabulary.txt").read_text().split("\n") == ["lemon", "red apple", ""]
    assert (folder / "styles.txt").read_text().split("\n") == ["noto", "3d", ""]


def test_a_denoiser_over_the_limit_is_refused(tmp_path: Path) -> None:
    model = denoiser.build(DenoiserConfig(width=320, depth=8))
    with pytest.raises(ValueError, match="lower width or depth"):
        export.export_transformer(tmp_path, model.state_dict(), model.config, "ddpm")


@pytest.mark.parametrize("prompt", ["", "Red APPLE, 3d", "~`!@#$%^&*()_+{}|:<>?\t\\", "naïve 日本 🍎"])
def test_tokenizer_takes_any_text(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    ids = tokenizer(prompt)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == prompt.lower().strip()


def test_text_states_do_not_depend_on_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = text.build_encoder(TEXT, tokenizer).eval()
    alone, _ = text.encode(encoder, tokenizer, ["lemon"])
    padded, mask = text.encode(encoder, tokenizer, ["lemon", "red apple and a pear, fruit, noto"])
    torch.testing.assert_close(padded[0, : alone.shape[1]], alone[0], rtol=1e-5, atol=1e-5)
    assert mask[0].sum() == alone.shape[1]


def test_distillation_loss_is_least_for_the_teacher_itself() -> None:
    teacher = torch.nn.functional.normalize(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    itself = text.distil_loss(teacher, teacher, 0.05)
    shuffled = text.distil_loss(teacher.roll(1, dims=0), teacher, 0.05)
    assert itself < 0.01 < 2.0 < shuffled
