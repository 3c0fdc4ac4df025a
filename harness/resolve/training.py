"""Whether a training can run to its end: its parts, sizes, objective and export; checked before it starts.

A training asks the same functions again part by part, so that a part used by itself refuses the same.
"""

from __future__ import annotations

from pathlib import Path

from harness.config.train import PARTS, DenoiserConfig, TimeSampling, TrainConfig
from models.files import check_component
from schedulers.compatibility import resolve
from schedulers.settings import NoiseSchedulerSettings

LOG_NORMAL_PATHS = ("flow", "edm")
"""The paths that are trained at log-normal times by default; the others at uniform ones."""
VAE_GROUPS = 8
"""Groups of channels that the autoencoder normalizes."""
DIFFUSERS_PREDICTIONS = {
    ("flow", "flow"): "flow_prediction",
    ("discrete_vp", "eps"): "epsilon",
    ("discrete_vp", "v"): "v_prediction",
    ("discrete_vp", "x0"): "sample",
    ("edm", "edm"): "epsilon",
}
"""diffusers' name of a prediction, by the path and prediction of an export."""


def check_training(train: TrainConfig, settings: NoiseSchedulerSettings | None) -> None:
    """Refuse a training that would fail later.

    Args:
        train: The `train` group.
        settings: The settings of its noise scheduler; None for a checkpoint's own.

    Raises:
        ValueError: One line with the key and what to change.
    """
    if settings is None:
        raise ValueError("scheduler=published is a checkpoint's; train scheduler=rectified_flow, ddpm or sgm")
    parts = trained_parts(train)
    full = resolve(settings)
    check_objective(train.denoiser, full)
    _check_sizes(train, parts)
    if "export" in parts:
        check_export(full)
    if "score" in parts:
        _check_score(train, settings)


def trained_parts(train: TrainConfig) -> list[str]:
    """Return the parts to run, in order.

    Raises:
        ValueError: A part is needless, or the base model is incomplete.
    """
    trained: tuple[str, ...] = ()
    if train.base_model is not None:
        folder, trained = Path(train.base_model), ("vae", "text")
        for name in ("vae", "text_encoder"):
            check_component(folder / name, folder / name)
        if not (folder / "tokenizer").is_dir():
            raise ValueError(f"train.base_model={train.base_model}: no tokenizer/ here")
    if train.parts is None:
        return [part for part in PARTS if part not in trained]
    if set(trained) & set(train.parts):
        raise ValueError(
            f"train.base_model={train.base_model} has a VAE and a text encoder; remove both parts from train.parts"
        )
    return [part for part in PARTS if part in train.parts]


def check_objective(denoiser: DenoiserConfig, settings: NoiseSchedulerSettings) -> None:
    """Refuse a noise scheduler or times that the loss is not made for.

    Args:
        denoiser: The `train.denoiser` group.
        settings: The complete settings of the noise scheduler.

    Raises:
        ValueError: One line says what to change.
    """
    if settings.prediction == "score":
        raise ValueError(
            "a plain squared error on the score weights the smallest noise without bound; train with "
            "scheduler.prediction=eps, which is -sigma times the score"
        )
    if settings.learned_variance:
        raise ValueError("the denoiser has no output for a learned variance; drop scheduler.learned_variance")
    if time_sampling(denoiser, settings) is not TimeSampling.uniform:
        return
    if settings.path == "edm":
        raise ValueError(
            f"train.denoiser.times=uniform would sample almost no time of {settings.family} at which the image "
            "forms; use log_normal"
        )
    if denoiser.ratio_mean is not None or denoiser.ratio_std is not None:
        raise ValueError(
            "train.denoiser.ratio_mean and ratio_std have no effect on uniform times; drop them, or set "
            "train.denoiser.times=log_normal"
        )


def time_sampling(denoiser: DenoiserConfig, settings: NoiseSchedulerSettings) -> TimeSampling:
    """Return how the times of a training are sampled."""
    own = TimeSampling.log_normal if settings.path in LOG_NORMAL_PATHS else TimeSampling.uniform
    return denoiser.times or own


def check_export(settings: NoiseSchedulerSettings) -> None:
    """Refuse a noise scheduler for which diffusers has no name.

    Args:
        settings: The complete settings of the noise scheduler.

    Raises:
        ValueError: One line says what to change.
    """
    s = settings
    if (s.path, s.prediction) not in DIFFUSERS_PREDICTIONS or s.edm_sign == -1 or s.zero_terminal_snr:
        raise ValueError(
            f"no noise scheduler of diffusers is written for prediction={s.prediction} on path={s.path}; leave "
            "train.parts without export, or train the family's own path and prediction"
        )
    if s.family == "ddpm" and s.spacing not in ("leading", "trailing", "linspace"):
        raise ValueError(f"diffusers' DDIM has no spacing={s.spacing}; export with scheduler.spacing=trailing")


def _check_score(train: TrainConfig, settings: NoiseSchedulerSettings) -> None:
    try:
        resolve(settings, train.score.steps)
    except ValueError as error:
        raise ValueError(f"train.score.steps={train.score.steps}: {error}") from error


def _check_sizes(train: TrainConfig, parts: list[str]) -> None:
    """Refuse sizes of networks that do not divide or fit one another."""
    vae, text, denoiser = train.vae, train.text, train.denoiser
    divided = [("denoiser.width", denoiser.width, "denoiser.heads", denoiser.heads)] * ("denoiser" in parts)
    divided += [("denoiser.latent_size", denoiser.latent_size, "denoiser.patch", denoiser.patch)] * (
        "denoiser" in parts
    )
    divided += [("text.width", text.width, "text.heads", text.heads)] * ("text" in parts)
    for name, size, other, divisor in divided:
        if size % divisor:
            raise ValueError(f"train.{name}={size} is not a multiple of train.{other}={divisor}; change one of them")
    if "vae" not in parts:
        return
    if not vae.channels or any(channels % VAE_GROUPS for channels in vae.channels):
        raise ValueError(f"train.vae.channels={vae.channels}; give one or more multiples of {VAE_GROUPS}")
    stride = 2 ** (len(vae.channels) - 1)
    if train.data.size % stride:
        raise ValueError(
            f"train.data.size={train.data.size} is not a multiple of {stride} pixels, which train.vae.channels of "
            f"{len(vae.channels)} levels make one latent pixel"
        )
    if "denoiser" not in parts:
        return
    fitting = (
        ("latent_channels", denoiser.latent_channels, vae.latent_channels, "train.vae.latent_channels"),
        ("latent_size", denoiser.latent_size, train.data.size // stride, "train.data.size and train.vae.channels"),
    )
    for name, own, needed, source in fitting:
        if own != needed:
            raise ValueError(f"train.denoiser.{name}={own}, but {source} give {needed}; set it to {needed}")
    if "text" in parts and denoiser.text_channels != text.width:
        raise ValueError(
            f"train.denoiser.text_channels={denoiser.text_channels}, but train.text.width gives {text.width}; set it "
            f"to {text.width}"
        )
