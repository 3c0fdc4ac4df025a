"""Every configuration key of Triptych: one typed field each, with its unit and a default that works.

Hydra composes `conf/` into these dataclasses, so a misspelt key or a wrong type is refused before anything runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from harness.config.cache import CacheConfig
from harness.config.optimize import CompileConfig, EagerConfig, Optimize
from harness.config.plan import HardwareConfig, PlanConfig
from harness.config.serve import LoadConfig, ServeConfig
from harness.config.train import TrainConfig


class Task(Enum):
    """What one run does."""

    generate = "generate"
    bench = "bench"
    compare = "compare"
    train = "train"
    plan = "plan"
    report = "report"
    serve = "serve"
    load = "load"


class LaunchMode(Enum):
    """Who starts the ranks: torchrun as a child process, or nobody (one rank in the calling process)."""

    torchrun = "torchrun"
    inprocess = "inprocess"


class WandbMode(Enum):
    """`auto` is online where the user is logged in, and offline elsewhere."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Load(Enum):
    """Where weights come from: a checkpoint, or random numbers of the real architecture (for work on speed)."""

    checkpoint = "checkpoint"
    dummy = "dummy"


class DType(Enum):
    """The dtype of the denoising network and the text encoder; the sampler's state is float32 always."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Quantize(Enum):
    """What of the denoiser's attention and feed-forward is in 8 bits, through torchao: nothing, the weights, or the
    inputs too (fp8 on CUDA).
    """

    none = "none"
    int8_weight_only = "int8_weight_only"
    int8_dynamic = "int8_dynamic"
    fp8 = "fp8"


@dataclass
class TaskConfig:
    """Group `task`."""

    name: Task = Task.generate
    warmup: int = 0  # generations before the measured ones
    repeats: int = 1  # measured generations
    fidelity: bool = False  # hold the pictures against a float32 reference on one rank (drawn once, then kept)
    profile: bool = False  # draw once more, with every network's operators timed
    states: bool = False  # and the state after every solver step
    bound: float | None = None  # what a sweeper minimises is infinite where the pixels' relative L2 is above this
    reference_steps: int | None = None  # of the reference, where a row with fewer is held against it; null = as many
    references: str | None = None  # folder of kept references; null = triptych/references in the user's cache
    out: str | None = None  # the page of task=report; null = report.html in `runs`


@dataclass
class TrainingFacts:
    """What the weights were trained with, and a noise scheduler has to follow; a new fact is one line here.

    Stated under `model.trained`, they fill the keys of the same name of group `scheduler`. null states nothing there.
    """

    path: str | None = None  # the Gaussian path, where the family has several
    prediction: str | None = None  # what the network outputs
    learned_variance: bool | None = None  # it outputs twice the channels
    train_steps: int | None = None  # N discrete timesteps
    beta_schedule: str | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool | None = None  # the last timestep is pure noise
    beta_min: float | None = None  # of the score SDE's vp and sub_vp
    beta_max: float | None = None
    sigma_data: float | None = None  # standard deviation of the data
    tau_map: str | None = None  # the number the network is told of its noise level
    edm_sign: int | None = None  # of the preconditioned output


@dataclass
class PublishedChoices:
    """How a checkpoint's authors sample from it, where the noise scheduler is not the published one: defaults of the
    keys of the same name of group `scheduler`, which may say otherwise.
    """

    spacing: str | None = None
    end: str | None = None
    steps_offset: int | None = None
    shift: float | None = None
    base_shift: float | None = None
    max_shift: float | None = None
    base_tokens: int | None = None
    max_tokens: int | None = None
    shift_terminal: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None


@dataclass
class TrainedConfig(TrainingFacts, PublishedChoices):
    """`model.trained.<family>`: the denoiser of one noise-scheduler family, and what it was trained with."""

    weights: str = "transformer"  # its folder in the checkpoint
    steps: int | None = None  # default of request.steps; null = model.steps
    guidance: float | None = None  # default of request.guidance; null = model.guidance


@dataclass
class ComponentConfig:
    """`model.vae`, `model.text_encoder` ...: one component of the checkpoint, replaced or in another dtype."""

    path: str | None = None  # a folder with its config.json, or one safetensors file of the same architecture
    dtype: DType | None = None  # null = model.dtype; the VAE's own default is float32


@dataclass
class PromptsConfig:
    """`model.text`: how prompts are encoded."""

    tokens: int = 24  # tokens the network attends to; longer prompts are cut, with a note
    keep: bool = True  # keep the text encoders in memory; false = load them for new prompts, then drop them
    cache_mib: float | None = None  # encoded prompts kept, MiB; null = 64, and 0 in task=bench unless keep=false


@dataclass
class LoraConfig:
    """One low-rank update, merged at load."""

    path: str = "???"  # a safetensors file, diffusers' or kohya's names
    weight: float = 1.0


@dataclass
class ModelConfig:
    """Group `model`: one checkpoint, with the defaults it was published with."""

    name: str = "emoji"
    architecture: str = "pixart"  # which builder in models.registry
    path: str | None = None  # checkpoint folder in the diffusers layout, denoiser file, or hub name; null = shipped
    hub: str | None = None  # where it is published; model.path=hub means this name
    revision: str | None = None  # branch, tag or commit of a hub name; null = its main branch
    load: Load = Load.checkpoint
    trained: dict[str, TrainedConfig] = field(default_factory=dict)  # its denoisers, one a noise-scheduler family
    dtype: DType = DType.float32
    text: PromptsConfig = field(default_factory=PromptsConfig)
    denoiser: ComponentConfig = field(default_factory=ComponentConfig)
    vae: ComponentConfig = field(default_factory=lambda: ComponentConfig(dtype=DType.float32))
    text_encoder: ComponentConfig = field(default_factory=ComponentConfig)
    text_encoder_2: ComponentConfig = field(default_factory=ComponentConfig)
    text_encoder_3: ComponentConfig = field(default_factory=ComponentConfig)
    tokenizer: ComponentConfig = field(default_factory=ComponentConfig)
    tokenizer_2: ComponentConfig = field(default_factory=ComponentConfig)
    tokenizer_3: ComponentConfig = field(default_factory=ComponentConfig)
    lora: list[LoraConfig] = field(default_factory=list)
    quantize: Quantize = Quantize.none  # once loaded, and low-rank updates merged
    offload: bool = False  # networks live in CPU memory and are on the GPU only while their stage runs
    negative_prompt: str = ""  # default of request.negative_prompt
    frames: int = 1  # default of request.frames
    frame_multiple: int = 1  # frames after the first are a multiple of it
    max_frames: int = 1  # 1 = pictures only
    fps: int = 16  # of videos
    steps: int = 20  # default of request.steps
    guidance: float = 3.0  # default of request.guidance
    height: int = 64  # default of request.height, pixels
    width: int = 64  # default of request.width, pixels
    size_multiple: int = 8  # pixels a latent token spans: height and width are multiples of it
    max_pixels: int = 1_048_576  # largest height * width accepted
    examples: list[str] = field(default_factory=list)  # prompts when the request names none


@dataclass
class SolverConfig:
    """Group `scheduler/solver`. null means the solver's own default (schedulers.compatibility.NoiseSchedulerSettings)."""

    name: str = "euler"
    eta: float | None = None  # noise of ddim and dpm2: 0 deterministic, 1 ancestral
    variance: str | None = None  # of ddpm: small, large, learned_range, learned
    final_noise: bool | None = None  # ddpm adds noise at its last step too
    kind: str | None = None  # of dpmpp: midpoint or heun
    order: int | None = None  # of unipc, deis and lms
    b: str | None = None  # of unipc: bh1 or bh2
    corrector: bool | None = None  # of unipc
    lower_order_final: bool | None = None  # the last of few steps are of falling order
    runge_kutta: bool | None = None  # pndm starts with it
    boundary: bool | None = None  # of lcm: the boundary scalings of LCM's checkpoints
    timestep_scaling: float | None = None  # of lcm
    gamma: float | None = None  # of tcd: share of the next row's noise that is fresh
    s_churn: float | None = None  # of edm_churn, as the three below
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None
    corrections: int | None = None  # Langevin steps of predictor_corrector
    snr: float | None = None  # their size
    rtol: float | None = None  # of rk45
    atol: float | None = None


@dataclass
class SchedulerConfig(TrainingFacts):
    """Group `scheduler`: the noise scheduler. null means what the weights were trained with (`model.trained`), and
    where that says nothing, the family's default (schedulers.compatibility.NoiseSchedulerSettings).
    """

    family: str = "rectified_flow"  # or published: the checkpoint's own scheduler_config.json
    solver: SolverConfig = field(default_factory=SolverConfig)
    state_dtype: str | None = None  # round the state to it after each step
    clip: float | None = None
    threshold: float | None = None
    spacing: str | None = None
    end: str | None = None
    coordinates: str | None = None
    steps_offset: int | None = None
    integer_timesteps: bool | None = None
    spare_row: bool | None = None
    stride_target: bool | None = None
    round_tau: str | None = None
    rho: float | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigmas: list[float] | None = None
    t_last: float | None = None
    geometric_sigma: bool | None = None
    original_steps: int | None = None
    shift: float | None = None
    mu: float | None = None
    base_shift: float | None = None
    max_shift: float | None = None
    base_tokens: int | None = None
    max_tokens: int | None = None
    sigma_last: float | None = None
    sigma_first: float | None = None
    sigma_cap: float | None = None
    shift_terminal: float | None = None


class Decode(Enum):
    """What the ranks of a picture deal to decode it: rows of it, or the latent frames of a video."""

    rows = "rows"
    frames = "frames"


@dataclass
class ParallelConfig:
    """Group `parallel`: degrees of the mesh; their product is the number of ranks."""

    dp: int = 1  # data parallel: micro-batches dealt over replicas
    cfg: int = 1  # classifier-free-guidance branches on different ranks
    tp: int = 1  # tensor parallel
    ring: int = 1  # ring attention
    ulysses: int = 1  # Ulysses sequence parallel, innermost
    pipe: int = 1  # PipeFusion: ranks hold runs of blocks, patches go through them; approximate
    patches: int | None = None  # of pipe; null = as many as ranks
    displaced: bool = False  # keys and values of the ring's other ranks are those of the evaluation before: approximate
    warmup: int = 1  # exact evaluations of a picture before those that are not
    shard_weights: bool = False  # deal the denoiser's weights over cfg x ring x ulysses, and gather a block to run it
    decode: Decode = Decode.rows  # frames: fewer and one-sided messages, a video's latent frames of a rank at once


@dataclass
class AttentionConfig:
    """Group `attention`."""

    backend: str = "auto"  # auto, math, sdpa, flash, flex, sage (models.registry)


@dataclass
class BlockCacheConfig:
    """Of engine=cache_dit: which evaluations of the network it cuts short after their first blocks (its DBCache); the
    defaults are those that SGLang runs it with.
    """

    first_blocks: int = 1  # computed in every evaluation; their change tells whether the others are computed too
    warmup: int = 4  # evaluations before the first that may be cut short
    threshold: float = 0.24  # relative L1 of that change, below which the others add what they added before


@dataclass
class EngineConfig:
    """Group `engine`: who draws."""

    name: str = "native"  # or diffusers: the checkpoint's own pipeline there, one rank, measured by the same code;
    # cache_dit: that pipeline with its blocks cached; sglang: that pipeline with SGLang-Diffusion's network and loop
    optimize: Optimize = Optimize.auto  # eager where it works; none, eager, compile (of diffusers: none, compile)
    eager: EagerConfig = field(default_factory=EagerConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    cache: BlockCacheConfig = field(default_factory=BlockCacheConfig)


@dataclass
class WandbConfig:
    """Weights & Biases: a mirror of the record."""

    mode: WandbMode = WandbMode.auto
    project: str = "triptych"
    group: str | None = None  # null = the sweep's folder name, or none for a single run
    name: str | None = None  # null = the run folder's name


@dataclass
class LoggerConfig:
    """Group `logger`: where results go beside the record."""

    table: bool = True  # print the summary table
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class LaunchConfig:
    """How ranks are started."""

    mode: LaunchMode = LaunchMode.torchrun
    threads_per_rank: int | None = None  # CPU threads; null = cores / ranks on this machine (see reproducible)
    start_timeout_s: float = 300.0  # until every rank is ready
    collective_timeout_s: float = 600.0  # a rank waits for another one in a forward; idle ranks wait for ever
    stop_timeout_s: float = 10.0  # from an orderly shutdown to SIGTERM, and from there to SIGKILL
    reuse: int = 1  # engines kept warm between the jobs of a sweep, each with its weights; 0 = fresh ranks every job
    reproducible: bool = True  # float32 equal at 1, 2, 4 ... threads (strict MKL, no oneDNN)


@dataclass
class RequestConfig:
    """What to draw."""

    prompt: str | None = None  # one prompt
    prompts: list[str] | None = None  # or several; neither = the model's examples
    negative_prompt: str | None = None  # what guidance moves away from; null = the model's default
    seed: int = 0  # picture k (over prompts, then samples) uses seed + k
    steps: int | None = None  # solver steps; null = the model's default
    guidance: float | None = None  # 1 = no guidance; null = the model's default
    height: int | None = None  # pixels; null = the model's default
    width: int | None = None  # pixels; null = the model's default
    frames: int | None = None  # of a video; null = the model's default
    samples_per_prompt: int = 1
    batch_size: int = 1  # pictures a forward; 1 makes a picture independent of its neighbours


@dataclass
class QualityConfig:
    """Scores beside the gallery's, on pretrained weights of yours (folders of transformers models); null = none."""

    clip: str | None = None  # a CLIP model: CLIP score
    features: str | None = None  # a vision model (DINOv2, ViT): Frechet distance of its pooled features
    reference: str | None = None  # the real pictures for it


@dataclass
class RunConfig:
    """The whole configuration of one run; `a` and `b` are the overrides of either side of task=compare (or task=load,
    where it compares), `runs` is the tree of records of task=report, or that task=plan is held against.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    request: RequestConfig = field(default_factory=RequestConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    a: list[str] | None = None
    b: list[str] | None = None
    runs: str | None = None
