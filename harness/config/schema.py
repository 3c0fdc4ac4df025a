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
    """When results go to Weights & Biases; `auto` is online if the user is logged in, and offline otherwise."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class Load(Enum):
    """Where weights come from: a checkpoint, or random numbers of the real architecture (for work on speed)."""

    checkpoint = "checkpoint"
    dummy = "dummy"


class DType(Enum):
    """The dtype of the denoising network and the text encoder; the sampler's state is always float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Quantize(Enum):
    """Which parts of the denoiser's attention and feed-forward layers use 8 bits, through torchao.

    `none` quantizes nothing, `int8_weight_only` the weights, `int8_dynamic` the weights and the inputs, and `fp8` both
    in 8-bit floating point (on CUDA).
    """

    none = "none"
    int8_weight_only = "int8_weight_only"
    int8_dynamic = "int8_dynamic"
    fp8 = "fp8"


@dataclass
class TaskConfig:
    """Group `task`: what the run does and how often it is measured."""

    name: Task = Task.generate  # what the run does
    warmup: int = 0  # generations before the measured ones
    repeats: int = 1  # measured generations
    fidelity: bool = False  # compare the images with a float32 reference on one rank, generated once and cached
    profile: bool = False  # generate once more and time the operators of every network
    fidelity_per_step: bool = False  # compare the state after every solver step with the reference's too
    max_pixel_error: float | None = None  # relative L2 of pixels above which a sweeper's objective is infinite
    reference_steps: int | None = None  # solver steps of the reference; null = as many as the run has
    references: str | None = None  # folder of the cached references; null = triptych/references in the user's cache


@dataclass
class TrainingSettings:
    """What the weights were trained with and a noise scheduler has to follow; a new setting is one line here.

    Given under `model.checkpoint_defaults`, they fill the keys of the same name in group `scheduler`. null means that
    nothing is stated.
    """

    path: str | None = None  # Gaussian probability path, if the family has several
    prediction: str | None = None  # what the network predicts: eps, x0, v, flow, score or edm
    learned_variance: bool | None = None  # whether the network outputs twice the channels, the second half a variance
    train_steps: int | None = None  # number N of discrete training timesteps
    beta_schedule: str | None = None  # schedule of the N betas: linear, scaled_linear or squaredcos
    beta_start: float | None = None  # first beta
    beta_end: float | None = None  # last beta
    zero_terminal_snr: bool | None = None  # whether the last timestep is pure noise
    beta_min: float | None = None  # smallest beta of the score SDE's vp and sub_vp paths
    beta_max: float | None = None  # largest beta of the score SDE's vp and sub_vp paths
    sigma_data: float | None = None  # standard deviation of the data
    tau_map: str | None = None  # how the noise level becomes the network's time: log_sigma, sigma, flow_time or arctan
    edm_sign: int | None = None  # sign of the preconditioned output: 1 or -1


@dataclass
class SamplingDefaults:
    """How the authors of a checkpoint sample from it, if the noise scheduler is not the published one.

    The fields are defaults of the keys of the same name in group `scheduler`, which may say otherwise.
    """

    spacing: str | None = None  # how timesteps are spaced
    end: str | None = None  # last row of the timesteps: clean or t_min
    steps_offset: int | None = None  # offset added to the timesteps of spacing=leading
    shift: float | None = None  # static timestep shift of a flow
    base_shift: float | None = None  # shift exponent mu at base_tokens
    max_shift: float | None = None  # shift exponent mu at max_tokens
    base_tokens: int | None = None  # image tokens at which the shift exponent is base_shift
    max_tokens: int | None = None  # image tokens at which the shift exponent is max_shift
    shift_terminal: float | None = None  # last sigma, to which the shifted sigmas are stretched
    sigma_min: float | None = None  # smallest sigma
    sigma_max: float | None = None  # largest sigma


@dataclass
class CheckpointDefaults(TrainingSettings, SamplingDefaults):
    """`model.checkpoint_defaults.<family>`: the denoiser of one noise-scheduler family and how it was trained."""

    weights: str = "transformer"  # folder of the denoiser in the checkpoint
    steps: int | None = None  # default of request.steps; null = model.steps
    guidance: float | None = None  # default of request.guidance; null = model.guidance


@dataclass
class ComponentConfig:
    """`model.vae`, `model.text_encoder` ...: one component of the checkpoint, replaced or in another dtype."""

    path: str | None = None  # folder with config.json, or one safetensors file of the same architecture
    dtype: DType | None = None  # dtype of the weights; null = model.dtype, but float32 for the VAE


@dataclass
class PromptsConfig:
    """`model.text`: how prompts are encoded."""

    tokens: int = 24  # text tokens that the network attends to; longer prompts are truncated, with a note
    keep_loaded: bool = True  # keep the text encoders in memory; false = load them for new prompts, then unload them
    cache_mib: float | None = None  # cache of encoded prompts, MiB; null = 64, but 0 in task=bench with keep_loaded


@dataclass
class LoraConfig:
    """One low-rank update, merged at load."""

    path: str = "???"  # safetensors file with diffusers' or kohya's names
    weight: float = 1.0  # factor of the update


@dataclass
class ModelConfig:
    """Group `model`: one checkpoint, with the defaults it was published with."""

    name: str = "emoji"  # name of the model
    architecture: str = "pixart"  # architecture, a key of models.registry
    path: str | None = None  # checkpoint folder in the diffusers layout, denoiser file, or hub name; null = shipped
    hub: str | None = None  # hub name under which the checkpoint is published; model.path=hub means this name
    revision: str | None = None  # branch, tag or commit of a hub name; null = its main branch
    load: Load = Load.checkpoint  # whether weights come from the checkpoint or are random
    checkpoint_defaults: dict[str, CheckpointDefaults] = field(default_factory=dict)  # denoiser by scheduler family
    dtype: DType = DType.float32  # dtype of the denoiser and the text encoders
    text: PromptsConfig = field(default_factory=PromptsConfig)  # how prompts are encoded
    denoiser: ComponentConfig = field(default_factory=ComponentConfig)  # denoising network
    vae: ComponentConfig = field(default_factory=lambda: ComponentConfig(dtype=DType.float32))  # VAE
    text_encoder: ComponentConfig = field(default_factory=ComponentConfig)  # first text encoder
    text_encoder_2: ComponentConfig = field(default_factory=ComponentConfig)  # second text encoder
    text_encoder_3: ComponentConfig = field(default_factory=ComponentConfig)  # third text encoder
    tokenizer: ComponentConfig = field(default_factory=ComponentConfig)  # tokenizer of the first text encoder
    tokenizer_2: ComponentConfig = field(default_factory=ComponentConfig)  # tokenizer of the second text encoder
    tokenizer_3: ComponentConfig = field(default_factory=ComponentConfig)  # tokenizer of the third text encoder
    lora: list[LoraConfig] = field(default_factory=list)  # low-rank updates, merged at load
    quantize: Quantize = Quantize.none  # 8-bit form of the denoiser, after loading and merging low-rank updates
    offload: bool = False  # keep networks in CPU memory and move each to the GPU only while its stage runs
    negative_prompt: str = ""  # default of request.negative_prompt
    frames: int = 1  # default of request.frames
    frame_multiple: int = 1  # frames after the first one are a multiple of this
    max_frames: int = 1  # largest number of frames; 1 = images only
    fps: int = 16  # frames per second of a video
    steps: int = 20  # default of request.steps
    guidance: float = 3.0  # default of request.guidance
    height: int = 64  # default of request.height, pixels
    width: int = 64  # default of request.width, pixels
    size_multiple: int = 8  # pixels per side of an image token; height and width are multiples of it
    max_pixels: int = 1_048_576  # largest height * width accepted, pixels
    examples: list[str] = field(default_factory=list)  # prompts if the request gives none


@dataclass
class SolverConfig:
    """Group `scheduler/solver`. null means the solver's own default."""

    name: str = "euler"  # name of the solver
    eta: float | None = None  # ddim and dpm2: amount of noise, 0 = deterministic, 1 = ancestral
    variance: str | None = None  # ddpm: small, large, learned_range or learned
    final_noise: bool | None = None  # ddpm: whether the last step adds noise too
    kind: str | None = None  # dpmpp solvers: midpoint or heun
    order: int | None = None  # unipc, deis and lms: order of the method
    b: str | None = None  # unipc: bh1 or bh2
    corrector: bool | None = None  # unipc: whether the corrector runs
    lower_order_final: bool | None = None  # whether the last of few steps use a lower order
    runge_kutta: bool | None = None  # pndm: whether it starts with Runge-Kutta steps
    boundary: bool | None = None  # lcm: whether the boundary scalings of LCM's checkpoints are used
    timestep_scaling: float | None = None  # lcm: timestep factor in the boundary scalings
    gamma: float | None = None  # tcd: fresh share of the next row's noise, 0 to 1
    s_churn: float | None = None  # edm_churn: S_churn of Karras et al. 2022
    s_tmin: float | None = None  # edm_churn: smallest sigma with churn, S_tmin
    s_tmax: float | None = None  # edm_churn: largest sigma with churn, S_tmax
    s_noise: float | None = None  # edm_churn: factor of the added noise, S_noise
    corrections: int | None = None  # predictor_corrector: Langevin steps per solver step
    snr: float | None = None  # predictor_corrector: signal-to-noise ratio that sets the size of Langevin steps
    rtol: float | None = None  # rk45: relative tolerance
    atol: float | None = None  # rk45: absolute tolerance


@dataclass
class SchedulerConfig(TrainingSettings):
    """Group `scheduler`: the noise scheduler.

    null means what the weights were trained with (`model.checkpoint_defaults`). If that states nothing, null means the
    default of the family (schedulers.compatibility.NoiseSchedulerSettings).
    """

    family: str = "rectified_flow"  # rectified_flow, ddpm or sgm; published = the checkpoint's scheduler_config.json
    solver: SolverConfig = field(default_factory=SolverConfig)  # the solver and its options
    state_dtype: str | None = None  # dtype to which the state is rounded after each step: float32, float16 or bfloat16
    clip: float | None = None  # limit of |x0|, to which x0 is clamped
    threshold: float | None = None  # quantile of |x0| to which x0 is clamped, in place of clip
    spacing: str | None = None  # how timesteps are spaced: linspace, leading, trailing, uniform, karras, ...
    end: str | None = None  # last row of the timesteps: clean or t_min
    coordinates: str | None = None  # coordinates of the steps: native, or ve for x / alpha
    steps_offset: int | None = None  # offset added to the timesteps of spacing=leading
    integer_timesteps: bool | None = None  # linspace: whether timesteps are rounded to trained indices
    spare_row: bool | None = None  # linspace and leading: make one more row and drop the last one
    stride_target: bool | None = None  # trailing: whether first-order steps land at t - N // n
    round_tau: str | None = None  # how the network's time is rounded to whole numbers: round or floor
    rho: float | None = None  # exponent of spacing=karras
    sigma_min: float | None = None  # smallest sigma of spacing=karras, exponential and beta
    sigma_max: float | None = None  # largest sigma of spacing=karras, exponential and beta
    sigmas: list[float] | None = None  # sigmas of spacing=custom, the noisiest first, without 0
    t_last: float | None = None  # last time of spacing=uniform
    geometric_sigma: bool | None = None  # uniform: whether the sigmas of path=ve are geometric
    original_steps: int | None = None  # steps of the distillation, for spacing=lcm
    shift: float | None = None  # static timestep shift of a flow
    mu: float | None = None  # exponent of the timestep shift of a flow: shift = e^mu
    base_shift: float | None = None  # shift exponent mu at base_tokens
    max_shift: float | None = None  # shift exponent mu at max_tokens
    base_tokens: int | None = None  # image tokens at which the shift exponent is base_shift
    max_tokens: int | None = None  # image tokens at which the shift exponent is max_shift
    sigma_last: float | None = None  # unshifted sigma of a flow's last evaluation; null = 1 / steps
    sigma_first: float | None = None  # unshifted sigma of a flow's first evaluation
    sigma_cap: float | None = None  # largest sigma of a flow
    shift_terminal: float | None = None  # last sigma, to which the shifted sigmas are stretched


class Decode(Enum):
    """What the ranks of one image shard to decode it: rows, or the latent frames of a video."""

    rows = "rows"
    frames = "frames"


@dataclass
class ParallelConfig:
    """Group `parallel`: degrees of the mesh; their product is the number of ranks."""

    dp: int = 1  # data-parallel degree: micro-batches are distributed over replicas
    cfg: int = 1  # degree for the branches of classifier-free guidance: 1 or 2
    tp: int = 1  # tensor-parallel degree
    ring: int = 1  # ring-attention degree
    ulysses: int = 1  # Ulysses sequence-parallel degree, the innermost axis
    pipe: int = 1  # PipeFusion degree: ranks hold consecutive blocks, and patches pass through them; approximate
    patches: int | None = None  # patches of PipeFusion; null = as many as its ranks
    displaced: bool = False  # use keys and values that the ring's other ranks had one evaluation before; approximate
    warmup: int = 1  # exact evaluations of an image before the approximate ones
    shard_weights: bool = False  # shard the denoiser's weights over cfg x ring x ulysses, gathering a block to run it
    decode: Decode = (
        Decode.rows
    )  # rows or frames; frames sends fewer, one-way messages, and a rank decodes its frames at once


@dataclass
class AttentionConfig:
    """Group `attention`: the attention kernel."""

    backend: str = "auto"  # auto, math, sdpa, flash, flex or sage (models.registry)


@dataclass
class BlockCacheConfig:
    """`engine.cache`: the DBCache of engine=cache_dit, which ends some evaluations after the first blocks.

    The defaults are those that SGLang runs it with.
    """

    first_blocks: int = 1  # blocks computed in every evaluation; their change decides whether the others run
    warmup: int = 4  # evaluations before the first one that may end early
    threshold: float = 0.24  # relative L1 of the change below which the residual of the other blocks is reused


@dataclass
class EngineConfig:
    """Group `engine`: which implementation generates.

    `native` is this project. `diffusers` is the checkpoint's own pipeline there, on one rank, measured by the same
    code. `cache_dit` is that pipeline with its blocks cached. `sglang` is that pipeline with the network and the loop
    of SGLang-Diffusion.
    """

    name: str = "native"  # native, diffusers (one rank), cache_dit (diffusers, cached blocks) or sglang
    optimize: Optimize = Optimize.auto  # none, eager or compile; auto = eager if it works (diffusers: none or compile)
    eager: EagerConfig = field(default_factory=EagerConfig)  # parts of optimize=eager
    compile: CompileConfig = field(default_factory=CompileConfig)  # options of optimize=compile
    cache: BlockCacheConfig = field(default_factory=BlockCacheConfig)  # options of engine=cache_dit


@dataclass
class WandbConfig:
    """`logger.wandb`: Weights & Biases, a mirror of the record."""

    mode: WandbMode = WandbMode.auto  # auto, online, offline or disabled
    project: str = "triptych"  # name of the project
    group: str | None = None  # name of the group; null = the sweep's folder name, or none for a single run
    name: str | None = None  # name of the run; null = the run folder's name


@dataclass
class LoggerConfig:
    """Group `logger`: where results go besides the record."""

    table: bool = True  # print the summary table
    wandb: WandbConfig = field(default_factory=WandbConfig)  # Weights & Biases


@dataclass
class LaunchConfig:
    """`launch`: how ranks are started."""

    mode: LaunchMode = LaunchMode.torchrun  # torchrun or inprocess
    threads_per_rank: int | None = None  # CPU threads; null = cores / ranks on this machine (see reproducible)
    start_timeout_s: float = 300.0  # longest time until every rank is ready, s
    collective_timeout_s: float = 600.0  # longest wait for another rank in a forward, s; idle ranks wait for ever
    stop_timeout_s: float = 10.0  # time from an orderly shutdown to SIGTERM, and from SIGTERM to SIGKILL, s
    reuse: int = 1  # engines kept running between the jobs of a sweep, with their weights; 0 = new ranks per job
    reproducible: bool = True  # equal float32 results at 1, 2, 4 ... threads (strict MKL, no oneDNN)


@dataclass
class RequestConfig:
    """`request`: what to generate."""

    prompt: str | None = None  # one prompt
    prompts: list[str] | None = None  # several prompts; null here and in prompt = the model's examples
    negative_prompt: str | None = None  # prompt that guidance moves away from; null = the model's default
    seed: int = 0  # seed of the first image; image k (over prompts, then samples) uses seed + k
    steps: int | None = None  # solver steps; null = the model's default
    guidance: float | None = None  # guidance scale, 1 = no guidance; null = the model's default
    height: int | None = None  # pixels; null = the model's default
    width: int | None = None  # pixels; null = the model's default
    frames: int | None = None  # frames of a video; null = the model's default
    samples_per_prompt: int = 1  # images per prompt
    batch_size: int = 1  # images per forward; 1 makes an image independent of its neighbours


@dataclass
class QualityConfig:
    """`quality`: scores besides the gallery's, on pretrained weights of yours (folders of transformers models)."""

    clip: str | None = None  # folder of a CLIP model for the CLIP score; null = no score
    features: str | None = None  # folder of a vision model (DINOv2, ViT) for a Frechet distance; null = no distance
    reference: str | None = None  # folder of the real images for the Frechet distance


@dataclass
class CompareConfig:
    """`compare`: the two configurations of task=compare, or of task=load if it compares, as lists of overrides."""

    a: list[str] | None = None  # overrides of the baseline; [] = the configuration as it is
    b: list[str] | None = None  # overrides of the candidate; [] = the configuration as it is


@dataclass
class ReportConfig:
    """`report`: the page of task=report."""

    runs: str | None = None  # folder of the runs: a run's, a sweep's, or one above them
    out: str | None = None  # HTML file to write; null = report.html in report.runs


@dataclass
class RunConfig:
    """The whole configuration of one run."""

    task: TaskConfig = field(default_factory=TaskConfig)  # what the run does
    engine: EngineConfig = field(default_factory=EngineConfig)  # which implementation generates
    model: ModelConfig = field(default_factory=ModelConfig)  # checkpoint and its defaults
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)  # noise scheduler
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # degrees of the mesh
    attention: AttentionConfig = field(default_factory=AttentionConfig)  # attention kernel
    cache: CacheConfig = field(default_factory=CacheConfig)  # which evaluations or branches are skipped
    logger: LoggerConfig = field(default_factory=LoggerConfig)  # where results go besides the record
    launch: LaunchConfig = field(default_factory=LaunchConfig)  # how ranks are started
    request: RequestConfig = field(default_factory=RequestConfig)  # what to generate
    quality: QualityConfig = field(default_factory=QualityConfig)  # scores on pretrained weights
    compare: CompareConfig = field(default_factory=CompareConfig)  # the two configurations of a comparison
    train: TrainConfig = field(default_factory=TrainConfig)  # task=train
    plan: PlanConfig = field(default_factory=PlanConfig)  # task=plan
    hardware: HardwareConfig = field(default_factory=HardwareConfig)  # machine of task=plan
    report: ReportConfig = field(default_factory=ReportConfig)  # task=report
    serve: ServeConfig = field(default_factory=ServeConfig)  # server of task=serve and task=load
    load: LoadConfig = field(default_factory=LoadConfig)  # clients of task=load
