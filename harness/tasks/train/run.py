"""``task=train``: data, VAE, text model, denoiser, export, score; each uses what earlier parts left on disk."""

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
from harness.resolve.training import trained_parts
from harness.tasks.train import captions, denoiser, emoji, export, retrieval, sample, text, vae
from harness.tasks.train.folder import CaptionedImage, load_pixels, read_folder
from harness.tasks.train.loop import PeriodicCallback, Trainer, configure_cpu, load_ema, step_generator
from harness.tasks.train.objective import Objective, objective
from models.checkpoint_source import CheckpointSource
from models.pixart import load_denoiser
from schedulers.settings import NoiseSchedulerSettings

log = logging.getLogger(__name__)

Result = dict[str, float | int | str]
RECIPES: dict[str, Callable[[DataConfig], None]] = {"emoji": emoji.build}
SHEET = 16  # images of a sheet of samples


@dataclass(frozen=True)
class TrainContext:
    """The inputs of every part.

    Attributes:
        config: Config group `train`.
        objective: The loss of the trained family.
        folder: The run's folder.
        rows: All images of the data set.
        callback: Callback for the progress.
    """

    config: TrainConfig
    objective: Objective
    folder: Path
    rows: list[CaptionedImage]
    callback: TrainingCallback

    @property
    def vocabulary(self) -> list[CaptionedImage]:
        """The images that the denoiser learns."""
        return [row for row in self.rows if row.vocabulary]

    @property
    def checkpoint(self) -> Path:
        """The denoiser's checkpoint file."""
        return self.folder / f"{denoiser.part_name(self.objective.family)}.safetensors"

    def pixels(self, rows: list[CaptionedImage]) -> Tensor:
        """Load images of the data set, uint8 (N, H, W, 3)."""
        return torch.from_numpy(load_pixels(Path(self.config.data.folder), rows))

    def autoencoder(self) -> AutoencoderKL:
        """Load the shared VAE, or the one trained in the run's folder."""
        if self.config.base_model is not None:
            return _autoencoder(Path(self.config.base_model))
        return vae.load(self.config.vae, self.config.data.size, self.folder / "vae.safetensors")

    def text_model(self) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
        """Load the shared text encoder and tokenizer, or those trained in the run's folder."""
        return _text_model(self.folder if self.config.base_model is None else Path(self.config.base_model))

    def scored_rows(self) -> list[CaptionedImage]:
        """Return the images whose captions are the prompts of the score; a sheet of samples shows the first of them."""
        config: ScoreConfig = self.config.score
        order = torch.randperm(len(self.vocabulary), generator=step_generator(config.seed, 0)).tolist()
        return [self.vocabulary[i] for i in order[: config.prompts]]


def run(
    config: TrainConfig, settings: NoiseSchedulerSettings, callback: TrainingCallback | None = None
) -> dict[str, Result]:
    """Run the parts of the training.

    Args:
        config: Config group `train`.
        settings: Noise scheduler of the trained family; the family's defaults fill in unset values.
        callback: Callback for the progress.

    Returns:
        The result of each part, also written to ``result.json`` in the run's folder.

    Raises:
        ValueError: The training cannot run; the message says in one line what to change.
        FileNotFoundError: A part's predecessor has not run.
    """
    parts, chosen = trained_parts(config), objective(config.denoiser, settings)
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    context = TrainContext(
        config, chosen, folder, _data(config.data), TrainingCallback() if callback is None else callback
    )
    results: dict[str, Result] = {}
    for part in parts:
        results[part] = PARTS[part](context)
        log.info("%s: %s", part, results[part])
    path = folder / "result.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **results}, indent=2) + "\n")
    return results


def _data(config: DataConfig) -> list[CaptionedImage]:
    """List the images of the data folder; if a recipe is named, it builds the folder first."""
    if config.recipe is not None:
        RECIPES[config.recipe](config)
    return read_folder(Path(config.folder), config.size)


def run_data(context: TrainContext) -> Result:
    """Count the images of the data folder, which is built already."""
    return {"images": len(context.rows), "vocabulary_images": len(context.vocabulary)}


def run_vae(context: TrainContext) -> Result:
    """Train the VAE on all but the held-out images, which are taken from those outside the vocabulary.

    Args:
        context: Inputs of the part.

    Returns:
        The PSNR on both sets of images, and the mean and deviation of the final latents.
    """
    config = context.config.vae
    outside = [row for row in context.rows if not row.vocabulary]
    order = torch.randperm(len(outside), generator=step_generator(config.loop.seed, 0)).tolist()
    held_out = [outside[i] for i in order[: config.held_out]]
    names = {row.file_name for row in held_out}
    training = [row for row in context.rows if row.file_name not in names]
    model = vae.train(config, context.pixels(training), context.config.data.size, context.folder, context.callback)
    known = context.pixels(context.vocabulary)
    mean, std = vae.statistics(model, known)
    result: Result = {
        "vocabulary_psnr_db": vae.psnr_db(known, vae.decode(model, vae.encode(model, known))),
        "latent_largest_mean": float(mean.abs().max()),
        "latent_least_std": float(std.min()),
        "latent_largest_std": float(std.max()),
    }
    if held_out:
        unseen = context.pixels(held_out)
        result["held_out_psnr_db"] = vae.psnr_db(unseen, vae.decode(model, vae.encode(model, unseen)))
    return result


def run_text(context: TrainContext) -> Result:
    """Train tokenizer and text encoder.

    Args:
        context: Inputs of the part.

    Returns:
        The number of names, and the cosine of the two closest names by their mean states.
    """
    text.train(context.config.text, context.rows, context.folder, context.callback)
    encoder, tokenizer = context.text_model()
    names = list(dict.fromkeys(row.name for row in context.vocabulary))
    cosine = text.similarity(encoder, tokenizer, names)
    return {"names": len(names), "largest_cosine_of_two_names": float(cosine.fill_diagonal_(-1.0).max())}


def run_denoiser(context: TrainContext) -> Result:
    """Train the denoiser of the configured family on latents and text states computed once.

    Args:
        context: Inputs of the part.

    Returns:
        Family, steps, images seen and time in seconds.
    """
    config = context.config.denoiser
    configure_cpu(config.loop)
    latents = vae.encode(context.autoencoder(), context.pixels(context.vocabulary))
    examples = denoiser.prepare(latents, context.vocabulary, *context.text_model())
    every = (
        PeriodicCallback(max(1, config.sample_every // config.loop.batch), _save_samples(context))
        if config.sample_every
        else None
    )
    trainer = denoiser.train(config, context.objective, examples, context.folder, context.callback, every)
    images, family = trainer.step * config.loop.batch, context.objective.family
    return {"family": family, "steps": trainer.step, "images": images, "seconds": trainer.elapsed_s}


def _save_samples(context: TrainContext) -> Callable[[Trainer], None]:
    """Return a function that saves samples of the averaged weights, always with the same prompts and noise."""
    score, noise_scheduler = context.config.score, context.objective.noise_scheduler()
    prompts = [captions.caption(row.name, row.style) for row in context.scored_rows()[:SHEET]]
    network = denoiser.build(context.config.denoiser).eval()
    parts = sample.components(network, context.autoencoder(), *context.text_model())
    (context.folder / "samples").mkdir(exist_ok=True)

    def save_samples(trainer: Trainer) -> None:
        network.load_state_dict(trainer.ema.shadow)
        generated = sample.generate_images(parts, noise_scheduler, prompts, score, context.config.data.size)
        images = trainer.step * trainer.config.batch
        path = context.folder / "samples" / f"{trainer.part}-{images}.png"
        grid(list(generated), prompts).save(path)
        context.callback.sheet(trainer.part, images, path)

    return save_samples


def run_export(context: TrainContext) -> Result:
    """Write the averaged weights as one folder in diffusers' layout; parts that families share are written once.

    Args:
        context: Inputs of the part.

    Returns:
        Family, folder and its size in bytes.
    """
    config, target, family = context.config, Path(context.config.export), context.objective.family
    weights = load_ema(context.checkpoint)
    if config.base_model is None:
        export.export_parts(target, context.autoencoder(), context.folder, context.rows)
    else:
        export.copy_parts(target, Path(config.base_model), context.rows)
    export.export_gallery(target, context.pixels(context.vocabulary).numpy(), context.vocabulary)
    export.export_transformer(target, weights, denoiser.build(config.denoiser).config, family)
    export.export_noise_scheduler(target, context.objective.settings)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return {"family": family, "folder": str(target), "bytes": size}


def run_score(context: TrainContext) -> Result:
    """Score prompt retrieval with the exported weights, and save a sheet of the first images.

    Args:
        context: Inputs of the part.

    Returns:
        Family and score.
    """
    source, family = Path(context.config.export), context.objective.family
    rows, scored = context.vocabulary, context.scored_rows()
    network = load_denoiser(CheckpointSource(source, export.component("transformer", family)))
    parts = sample.components(network, _autoencoder(source), *_text_model(source))
    prompts = [captions.caption(row.name, row.style) for row in scored]
    generated = sample.generate_images(
        parts, context.objective.noise_scheduler(), prompts, context.config.score, context.config.data.size
    )
    gallery = retrieval.TrainingGallery(
        context.pixels(rows).numpy(), [row.name for row in rows], [row.style for row in rows]
    )
    score = gallery.score(generated, [row.name for row in scored], [row.style for row in scored])
    grid(list(generated[:SHEET]), prompts[:SHEET]).save(context.folder / f"samples-{family}.png")
    Image.fromarray(retrieval.contact_sheet(generated, 10)).save(context.folder / f"scored-{family}.png")
    return {"family": family, **asdict(score)}


def _autoencoder(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32, low_cpu_mem_usage=False).eval()


def _text_model(folder: Path) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    transformers_logging.disable_progress_bar()  # training has its own bars or log lines
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    return encoder, AutoTokenizer.from_pretrained(folder / "tokenizer")


PARTS: dict[str, Callable[[TrainContext], Result]] = {
    "data": run_data,
    "vae": run_vae,
    "text": run_text,
    "denoiser": run_denoiser,
    "export": run_export,
    "score": run_score,
}
