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

from harness.config.train import TrainConfig
from harness.train import captions, denoiser, emoji, export, retrieval, sample, text, vae
from harness.train.loop import Mirror, averaged, step_generator
from models.dit import load_dit

log = logging.getLogger(__name__)

Result = dict[str, float | int | str]


@dataclass(frozen=True)
class Room:
    """What every part is handed: configuration, run folder, rows of the data, where the curve is mirrored."""

    config: TrainConfig
    folder: Path
    rows: list[emoji.Emoji]
    mirror: Mirror | None

    @property
    def vocabulary(self) -> list[emoji.Emoji]:
        """The rows that the denoiser learns."""
        return [row for row in self.rows if row.vocabulary]

    def pixels(self, rows: list[emoji.Emoji]) -> Tensor:
        """uint8 pictures (N, H, W, 3) of ``rows``."""
        return torch.from_numpy(emoji.pixels(Path(self.config.data.folder), rows))

    def autoencoder(self) -> AutoencoderKL:
        """The trained VAE of the run folder."""
        return vae.load(self.config.vae, self.config.data.size, self.folder / "vae.safetensors")


def run(config: TrainConfig, mirror: Mirror | None = None) -> dict[str, Result]:
    """Run the parts of ``config`` and return what each reports; also written to ``result.json`` in the run folder.

    Raises ``ValueError`` for an unknown part, ``FileNotFoundError`` for a part whose predecessor has not run.
    """
    unknown = [part for part in config.parts if part not in PARTS]
    if unknown:
        raise ValueError(f"train.parts has {unknown}; the parts are {list(PARTS)}")
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    room = Room(config, folder, emoji.build(config.data), mirror)
    results: dict[str, Result] = {}
    for part in PARTS:
        if part in config.parts:
            results[part] = PARTS[part](room)
            log.info("%s: %s", part, results[part])
    path = folder / "result.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **results}, indent=2) + "\n")
    return results


def run_data(room: Room) -> Result:
    """The folder is built already; what is in it."""
    return {"pictures": len(room.rows), "vocabulary_pictures": len(room.vocabulary)}


def run_vae(room: Room) -> Result:
    """Train the VAE on all but the held-out pictures; PSNR on those, and what deviation the latents ended with."""
    config = room.config.vae
    outside = [row for row in room.rows if not row.vocabulary]
    order = torch.randperm(len(outside), generator=step_generator(config.loop.seed, 0)).tolist()
    held_out = [outside[i] for i in order[: config.held_out]]
    names = {row.file_name for row in held_out}
    training = [row for row in room.rows if row.file_name not in names]
    model = vae.train(config, room.pixels(training), room.config.data.size, room.folder, room.mirror)
    unseen, known = room.pixels(held_out), room.pixels(room.vocabulary)
    mean, std = vae.statistics(model, known)
    return {
        "held_out_psnr_db": vae.psnr_db(unseen, vae.decode(model, vae.encode(model, unseen))),
        "vocabulary_psnr_db": vae.psnr_db(known, vae.decode(model, vae.encode(model, known))),
        "latent_largest_mean": float(mean.abs().max()),
        "latent_least_std": float(std.min()),
        "latent_largest_std": float(std.max()),
    }


def run_text(room: Room) -> Result:
    """Train tokenizer and text encoder; how near the two closest names are by their mean states."""
    text.train(room.config.text, room.rows, room.folder, room.mirror)
    encoder, tokenizer = _text_model(room.folder)
    names = list(dict.fromkeys(row.name for row in room.vocabulary))
    cosine = text.similarity(encoder, tokenizer, names)
    return {"names": len(names), "largest_cosine_of_two_names": float(cosine.fill_diagonal_(-1.0).max())}


def run_denoiser(room: Room) -> Result:
    """Train the denoiser of the configured family on latents and text states computed once."""
    latents = vae.encode(room.autoencoder(), room.pixels(room.vocabulary))
    examples = denoiser.prepare(latents, room.vocabulary, *_text_model(room.folder))
    fit = denoiser.train(room.config.denoiser, examples, room.folder, room.mirror)
    return {"steps": fit.step, "images": fit.step * room.config.denoiser.loop.batch, "seconds": fit.elapsed_s}


def run_export(room: Room) -> Result:
    """Write the averaged weights as one folder in diffusers' layout."""
    config, target = room.config.denoiser, Path(room.config.export)
    weights = averaged(room.folder / f"{denoiser.part(config)}.safetensors")
    export.export_parts(target, room.autoencoder(), room.folder, room.rows)
    export.export_transformer(target, weights, denoiser.build(config).config)
    return {"folder": str(target), "bytes": sum(path.stat().st_size for path in target.rglob("*") if path.is_file())}


def run_score(room: Room) -> Result:
    """Prompt retrieval with the exported weights, and a sheet of the first sixteen pictures."""
    config, source = room.config.score, Path(room.config.export)
    rows = room.vocabulary
    order = torch.randperm(len(rows), generator=step_generator(config.seed, 0)).tolist()
    asked = [rows[i] for i in order[: config.prompts]]
    drawn = sample.pictures(
        load_dit(source / "transformer"),
        denoiser.noise_scheduler(room.config.denoiser),
        AutoencoderKL.from_pretrained(source / "vae", dtype=torch.float32, low_cpu_mem_usage=False).eval(),
        *_text_model(source),
        prompts=[captions.caption(row.name, row.style) for row in asked],
        guidance=config.guidance,
        steps=config.steps,
        seed=config.seed,
    ).numpy()
    gallery = retrieval.Gallery(room.pixels(rows).numpy(), [row.name for row in rows], [row.style for row in rows])
    score = gallery.score(drawn, [row.name for row in asked], [row.style for row in asked])
    Image.fromarray(retrieval.grid(drawn[:16], 8)).save(room.folder / "samples.png")
    Image.fromarray(retrieval.grid(drawn, 10)).save(room.folder / "scored.png")
    return asdict(score)


def _text_model(folder: Path) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
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
