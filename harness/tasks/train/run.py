"""``task=train``: data, VAE, text model, denoiser, export, score; each on what the earlier left on disk."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5EncoderModel
from transformers.utils import logging as transformers_logging

from harness.config.train import DataConfig, ScoreConfig, TrainConfig
from harness.loggers.training import TrainingCallback
from harness.records.media import grid
from harness.tasks.train import captions, denoiser, emoji, export, retrieval, sample, text, vae
from harness.tasks.train.folder import Picture, pixels, read
from harness.tasks.train.loop import Every, Fit, averaged, settle, step_generator
from harness.tasks.train.objective import Objective, objective
from models.files import check_component
from models.pixart import load_denoiser
from models.source import Source
from schedulers.families import Settings

log = logging.getLogger(__name__)

Result = dict[str, float | int | str]
RECIPES: dict[str, Callable[[DataConfig], None]] = {"emoji": emoji.build}
SHEET = 16  # pictures of a sheet of samples


@dataclass(frozen=True)
class Room:
    """What every part is handed: configuration, objective, run folder, rows of the data, who watches."""

    config: TrainConfig
    objective: Objective
    folder: Path
    rows: list[Picture]
    watcher: TrainingCallback

    @property
    def vocabulary(self) -> list[Picture]:
        """The rows that the denoiser learns."""
        return [row for row in self.rows if row.vocabulary]

    @property
    def checkpoint(self) -> Path:
        """The denoiser's checkpoint."""
        return self.folder / f"{denoiser.part(self.objective.family)}.safetensors"

    def pixels(self, rows: list[Picture]) -> Tensor:
        """uint8 pictures (N, H, W, 3) of ``rows``."""
        return torch.from_numpy(pixels(Path(self.config.data.folder), rows))

    def autoencoder(self) -> AutoencoderKL:
        """The shared VAE, or the one trained in the run folder."""
        if self.config.base_model is not None:
            return _autoencoder(Path(self.config.base_model))
        return vae.load(self.config.vae, self.config.data.size, self.folder / "vae.safetensors")

    def text_model(self) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
        """The shared text encoder and tokenizer, or those trained in the run folder."""
        return _text_model(self.folder if self.config.base_model is None else Path(self.config.base_model))

    def asked(self) -> list[Picture]:
        """The pictures whose captions are the prompts of the score; a sheet shows the first of them."""
        config: ScoreConfig = self.config.score
        order = torch.randperm(len(self.vocabulary), generator=step_generator(config.seed, 0)).tolist()
        return [self.vocabulary[i] for i in order[: config.prompts]]


def run(config: TrainConfig, settings: Settings, watcher: TrainingCallback | None = None) -> dict[str, Result]:
    """Run the parts of ``config`` and return what each reports; also written to ``result.json`` in the run folder.

    Args:
        config: the ``train`` group.
        settings: the noise scheduler whose family is trained, of which the family's training fills in what is None.
        watcher: is told how it goes.

    Raises:
        ValueError: what cannot run, with what to change in one line.
        FileNotFoundError: a part whose predecessor has not run.
    """
    parts, chosen = _parts(config), objective(config.denoiser, settings)
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    room = Room(config, chosen, folder, _data(config.data), TrainingCallback() if watcher is None else watcher)
    results: dict[str, Result] = {}
    for part in parts:
        results[part] = PARTS[part](room)
        log.info("%s: %s", part, results[part])
    path = folder / "result.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **results}, indent=2) + "\n")
    return results


def _parts(config: TrainConfig) -> list[str]:
    """The parts that run, in order."""
    if config.base_model is not None:
        for name in ("vae", "text_encoder"):
            check_component(Path(config.base_model) / name, Path(config.base_model) / name)
        if not (Path(config.base_model) / "tokenizer").is_dir():
            raise ValueError(f"train.base_model={config.base_model}: no tokenizer/ here")
    trained = ("vae", "text") if config.base_model is not None else ()
    if config.parts is None:
        return [part for part in PARTS if part not in trained]
    unknown = [part for part in config.parts if part not in PARTS]
    if unknown:
        raise ValueError(f"train.parts has {unknown}; the parts are {list(PARTS)}")
    if set(trained) & set(config.parts):
        raise ValueError(
            f"train.base_model={config.base_model} brings VAE and text encoder; take both parts out of train.parts"
        )
    return [part for part in PARTS if part in config.parts]


def _data(config: DataConfig) -> list[Picture]:
    """The rows of the data folder, built first where a recipe is named."""
    if config.recipe is not None:
        if config.recipe not in RECIPES:
            raise ValueError(
                f"train.data.recipe={config.recipe}; the recipes are {list(RECIPES)}, and null takes a folder as it is"
            )
        RECIPES[config.recipe](config)
    return read(Path(config.folder), config.size)


def run_data(room: Room) -> Result:
    """The folder is built already; what is in it."""
    return {"pictures": len(room.rows), "vocabulary_pictures": len(room.vocabulary)}


def run_vae(room: Room) -> Result:
    """Train the VAE on all but the held-out pictures, which are taken from those outside the vocabulary; PSNR on both,
    and what deviation the latents ended with.
    """
    config = room.config.vae
    outside = [row for row in room.rows if not row.vocabulary]
    order = torch.randperm(len(outside), generator=step_generator(config.loop.seed, 0)).tolist()
    held_out = [outside[i] for i in order[: config.held_out]]
    names = {row.file_name for row in held_out}
    training = [row for row in room.rows if row.file_name not in names]
    model = vae.train(config, room.pixels(training), room.config.data.size, room.folder, room.watcher)
    known = room.pixels(room.vocabulary)
    mean, std = vae.statistics(model, known)
    result: Result = {
        "vocabulary_psnr_db": vae.psnr_db(known, vae.decode(model, vae.encode(model, known))),
        "latent_largest_mean": float(mean.abs().max()),
        "latent_least_std": float(std.min()),
        "latent_largest_std": float(std.max()),
    }
    if held_out:
        unseen = room.pixels(held_out)
        result["held_out_psnr_db"] = vae.psnr_db(unseen, vae.decode(model, vae.encode(model, unseen)))
    return result


def run_text(room: Room) -> Result:
    """Train tokenizer and text encoder; how near the two closest names are by their mean states."""
    text.train(room.config.text, room.rows, room.folder, room.watcher)
    encoder, tokenizer = room.text_model()
    names = list(dict.fromkeys(row.name for row in room.vocabulary))
    cosine = text.similarity(encoder, tokenizer, names)
    return {"names": len(names), "largest_cosine_of_two_names": float(cosine.fill_diagonal_(-1.0).max())}


def run_denoiser(room: Room) -> Result:
    """Train the denoiser of the configured family on latents and text states computed once."""
    config = room.config.denoiser
    settle(config.loop)
    latents = vae.encode(room.autoencoder(), room.pixels(room.vocabulary))
    examples = denoiser.prepare(latents, room.vocabulary, *room.text_model())
    every = Every(max(1, config.sample_every // config.loop.batch), _sheets(room)) if config.sample_every else None
    fit = denoiser.train(config, room.objective, examples, room.folder, room.watcher, every)
    images, family = fit.step * config.loop.batch, room.objective.family
    return {"family": family, "steps": fit.step, "images": images, "seconds": fit.elapsed_s}


def _sheets(room: Room) -> Callable[[Fit], None]:
    """Draws with the averaged weights of a running training, always the same prompts and noise."""
    score, noise_scheduler = room.config.score, room.objective.noise_scheduler()
    prompts = [captions.caption(row.name, row.style) for row in room.asked()[:SHEET]]
    network = denoiser.build(room.config.denoiser).eval()
    parts = sample.components(network, room.autoencoder(), *room.text_model())
    (room.folder / "samples").mkdir(exist_ok=True)

    def draw(fit: Fit) -> None:
        network.load_state_dict(fit.ema.shadow)
        drawn = sample.pictures(parts, noise_scheduler, prompts, score, room.config.data.size)
        images = fit.step * fit.config.batch
        path = room.folder / "samples" / f"{fit.part}-{images}.png"
        grid(list(drawn), prompts).save(path)
        room.watcher.sheet(fit.part, images, path)

    return draw


def run_export(room: Room) -> Result:
    """Write the averaged weights as one folder in diffusers' layout; what families share is written once."""
    config, target, family = room.config, Path(room.config.export), room.objective.family
    weights = averaged(room.checkpoint)
    if config.base_model is None:
        export.export_parts(target, room.autoencoder(), room.folder, room.rows)
    else:
        export.copy_parts(target, Path(config.base_model), room.rows)
    export.export_gallery(target, room.pixels(room.vocabulary).numpy(), room.vocabulary)
    export.export_transformer(target, weights, denoiser.build(config.denoiser).config, family)
    export.export_noise_scheduler(target, room.objective.settings)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return {"family": family, "folder": str(target), "bytes": size}


def run_score(room: Room) -> Result:
    """Prompt retrieval with the exported weights, and a sheet of the first pictures."""
    source, family = Path(room.config.export), room.objective.family
    rows, asked = room.vocabulary, room.asked()
    network = load_denoiser(Source(source, export.component("transformer", family)))
    parts = sample.components(network, _autoencoder(source), *_text_model(source))
    prompts = [captions.caption(row.name, row.style) for row in asked]
    drawn = sample.pictures(parts, room.objective.noise_scheduler(), prompts, room.config.score, room.config.data.size)
    gallery = retrieval.Gallery(room.pixels(rows).numpy(), [row.name for row in rows], [row.style for row in rows])
    score = gallery.score(drawn, [row.name for row in asked], [row.style for row in asked])
    grid(list(drawn[:SHEET]), prompts[:SHEET]).save(room.folder / f"samples-{family}.png")
    Image.fromarray(retrieval.grid(drawn, 10)).save(room.folder / f"scored-{family}.png")
    return {"family": family, **asdict(score)}


def _autoencoder(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32, low_cpu_mem_usage=False).eval()


def _text_model(folder: Path) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    transformers_logging.disable_progress_bar()  # there is a bar of ours, or a log
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    return encoder, AutoTokenizer.from_pretrained(folder / "tokenizer")


PARTS: dict[str, Callable[[Room], Result]] = {
    "data": run_data,
    "vae": run_vae,
    "text": run_text,
    "denoiser": run_denoiser,
    "export": run_export,
    "score": run_score,
}
