"""Every configuration key of Triptych: one typed field each, with its unit and a default that works.

Hydra composes `conf/` into these dataclasses, so a misspelt key or a wrong type is refused before anything runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from harness.config.bounds import (
    MAX_DEGREE,
    MAX_FRAMES,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_REPEATS,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    MAX_WAIT_S,
)
from harness.config.cache import CacheConfig
from harness.config.dataset import DatasetConfig
from harness.config.engines import ENGINES
from harness.config.kinds import CLASSIFIER_FREE, GUIDANCE_RULES, METRICS, STAGES
from harness.config.load import LoadConfig
from harness.config.optimize import CompileConfig, EagerConfig, Optimize
from harness.config.plan import HardwareConfig, PlanConfig
from harness.config.serve import ServeConfig
from harness.config.train import TrainConfig
from models.registry import ARCHITECTURES, ATTENTION_BACKENDS
from schedulers.options import group, option
from schedulers.registry import Names
from schedulers.settings import SamplingDefaults, SchedulerOptions, SolverOptions, TrainingSettings
from schedulers.tables import FAMILIES, SOLVERS

SERVING = ("task=serve", "task=load")
GENERATING = ("task=generate", "task=bench", "task=compare", *SERVING)
PROMPTING = ("task=generate", "task=bench", "task=compare", "task=load")
LOGGING = ("task=generate", "task=bench", "task=compare", "task=load", "task=plan", "task=train")
MIRRORED = ("task=generate", "task=bench", "task=compare", "task=load", "task=train")
REPEATING = ("task=generate", "task=bench")
PREDICTING = (*GENERATING, "task=plan")


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


class WaitPolicy(Enum):
    """How OpenMP's threads wait for one another: at a barrier, some compute until others have a core again."""

    auto = "auto"
    default = "default"
    adaptive = "adaptive"
    brief = "brief"
    passive = "passive"


class WandbMode(Enum):
    """When results go to Weights & Biases; `auto` is online if the user is logged in, and offline otherwise.

    `auto` is disabled if wandb is not installed, which a note in the record says.

    Where the server does not answer, runs are logged offline, and a note in the record says so.
    """

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


class ProgressMode(Enum):
    """How progress is shown; `auto` is bars on a terminal and lines elsewhere."""

    auto = "auto"
    lines = "lines"
    none = "none"


class LogLevel(Enum):
    """Level of the logs."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


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

    name: Task = option(Task.generate, "What the run does.")
    warmup: int = option(
        0, "Generations before the measured ones.", low=0, high=MAX_REPEATS, reads=("task=bench", "task=compare")
    )
    repeats: int = option(
        1,
        "Measured generations; rounds of a comparison.",
        low=1,
        high=MAX_REPEATS,
        reads=("task=bench", "task=compare", "task=load"),
    )
    fidelity: bool = option(
        False,
        "Compare the images with a float32 reference on one rank, generated once and cached.",
        reads=("task=bench", "task=compare", "task=generate"),
    )
    profile: bool = option(
        False, "Generate once more and time the operators of every network.", reads=("task=bench", "task=generate")
    )
    trace: bool = option(
        False,
        "Generate once more and write trace.json.gz, a Chrome trace of all ranks for ui.perfetto.dev.",
        reads=("task=bench", "task=generate"),
    )
    fidelity_per_step: bool = option(
        False, "Compare the state after every solver step with the reference's too.", reads=("task.fidelity=true",)
    )
    fidelity_peer: bool = option(
        True,
        "Hold the reference itself to engine=diffusers in float32, once per code, model and kind of request.",
        reads=("task.fidelity=true",),
    )
    max_pixel_error: float | None = option(
        None,
        "Relative L2 of pixels above which a sweeper's objective is infinite.",
        low=0,
        infinite=True,
        reads=("task.fidelity=true",),
    )
    reference_steps: int | None = option(
        None,
        "Solver steps of the reference. null = as many as the run has.",
        low=1,
        high=MAX_STEPS,
        reads=("task.fidelity=true",),
    )
    references: str | None = option(
        None,
        "Folder of the cached references. null = triptych/references in the user's cache.",
        reads=("task.fidelity=true",),
    )


@dataclass
class CheckpointDefaults(TrainingSettings, SamplingDefaults):
    """`model.checkpoint_defaults.<family>`: the denoiser of one noise-scheduler family and how it was trained."""

    weights: str = option("transformer", "Folder of the denoiser in the checkpoint.")
    steps: int | None = option(None, "Default of request.steps. null = model.steps.", low=1, high=MAX_STEPS)
    guidance: float | None = option(
        None, "Default of request.guidance. null = model.guidance.", low=0, high=MAX_GUIDANCE
    )


@dataclass
class ComponentConfig:
    """`model.vae`, `model.text_encoder` ...: one component of the checkpoint, replaced or in another dtype."""

    path: str | None = option(None, "Folder with config.json, or one safetensors file of the same architecture.")
    dtype: DType | None = option(
        None, "Dtype of the weights. null = model.dtype, but float32 for the VAE.", words=DType
    )


@dataclass
class PromptsConfig:
    """`model.text`: how prompts are encoded."""

    tokens: int = option(
        24, "Text tokens that the network attends to; longer prompts are truncated, with a note.", low=1, high=4_096
    )
    keep_loaded: bool = option(
        True, "Keep the text encoders in memory; false = load them for new prompts, then unload them."
    )
    cache_mib: float | None = option(
        None,
        "Size of the cache of encoded prompts; 0 disables it. null = 64; 0 in task=bench with keep_loaded; 8 for a "
        "data set.",
        unit="MiB",
        low=0,
        infinite=True,
    )


@dataclass
class LoraConfig:
    """One low-rank update, merged at load."""

    path: str = option("???", "Safetensors file with diffusers' or kohya's names.")
    weight: float = option(1.0, "Factor of the update.", low=-100, high=100)


@dataclass
class ModelConfig:
    """Group `model`: one checkpoint, with the defaults it was published with."""

    name: str = option("emoji", "Name of the model.")
    architecture: str = option("pixart", "Architecture of the denoising network.", words=Names(ARCHITECTURES))
    path: str | None = option(
        None, "Checkpoint folder in the diffusers layout, denoiser file, or hub name. null = shipped."
    )
    hub: str | None = option(None, "Hub name under which the checkpoint is published; model.path=hub means this name.")
    revision: str | None = option(None, "Branch, tag or commit of a hub name. null = its main branch.")
    load: Load = option(Load.checkpoint, "Whether weights come from the checkpoint or are random.")
    checkpoint_defaults: dict[str, CheckpointDefaults] = option({}, "Denoiser by scheduler family.")
    dtype: DType = option(DType.float32, "Dtype of the denoiser and the text encoders.")
    text: PromptsConfig = group(PromptsConfig, "How prompts are encoded.")
    denoiser: ComponentConfig = group(ComponentConfig, "Denoising network.")
    vae: ComponentConfig = group(lambda: ComponentConfig(dtype=DType.float32), "VAE.")
    text_encoder: ComponentConfig = group(ComponentConfig, "First text encoder.")
    text_encoder_2: ComponentConfig = group(ComponentConfig, "Second text encoder.")
    text_encoder_3: ComponentConfig = group(ComponentConfig, "Third text encoder.")
    tokenizer: ComponentConfig = group(ComponentConfig, "Tokenizer of the first text encoder.")
    tokenizer_2: ComponentConfig = group(ComponentConfig, "Tokenizer of the second text encoder.")
    tokenizer_3: ComponentConfig = group(ComponentConfig, "Tokenizer of the third text encoder.")
    lora: list[LoraConfig] = option([], "Low-rank updates, merged at load.")
    quantize: Quantize = option(
        Quantize.none, "8-bit form of the denoiser, after loading and merging low-rank updates."
    )
    offload: bool = option(False, "Keep networks in CPU memory and move each to the GPU only while its stage runs.")
    negative_prompt: str = option("", "Default of request.negative_prompt.")
    frames: int = option(1, "Default of request.frames.", low=1, high=MAX_FRAMES)
    frame_multiple: int = option(1, "Frames after the first one are a multiple of this.", low=1, high=MAX_FRAMES)
    max_frames: int = option(1, "Largest number of frames; 1 = images only.", low=1, high=MAX_FRAMES)
    fps: int = option(16, "Frames per second of a video.", low=1, high=240)
    steps: int = option(20, "Default of request.steps.", low=1, high=MAX_STEPS)
    guidance: float = option(3.0, "Default of request.guidance.", low=0, high=MAX_GUIDANCE)
    height: int = option(64, "Default of request.height.", unit="pixels", low=1, high=MAX_SIDE)
    width: int = option(64, "Default of request.width.", unit="pixels", low=1, high=MAX_SIDE)
    size_multiple: int = option(
        8, "Side of an image token; height and width are multiples of it.", unit="pixels", low=1, high=MAX_SIDE
    )
    max_pixels: int = option(
        1_048_576, "Largest height * width accepted.", unit="pixels", low=1, high=MAX_SIDE * MAX_SIDE
    )
    examples: list[str] = option([], "Prompts if the request gives none.")
    guidance_rule: str = option(
        CLASSIFIER_FREE,
        "How the outputs of the two branches of guidance are combined.",
        words=Names(GUIDANCE_RULES),
    )


@dataclass
class SolverConfig(SolverOptions):
    """Group `scheduler/solver`. null means the solver's own default."""

    name: str = option("euler", "Name of the solver.", words=Names(SOLVERS))


@dataclass
class SchedulerConfig(SchedulerOptions):
    """Group `scheduler`: the noise scheduler.

    null means what the weights were trained with (`model.checkpoint_defaults`). If that states nothing, null means the
    default of the path or solver.
    """

    family: str = option(
        "rectified_flow",
        "Family of the noise scheduler; published = that of the checkpoint's scheduler_config.json.",
        words=(*FAMILIES, "published"),
    )
    solver: SolverConfig = group(SolverConfig, "Solver and its options.")


class Decode(Enum):
    """What the ranks of one image shard to decode it: rows, or the latent frames of a video."""

    rows = "rows"
    frames = "frames"


@dataclass
class ParallelConfig:
    """Group `parallel`: degrees of the mesh; their product is the number of ranks."""

    dp: int = option(1, "Data-parallel degree: micro-batches are distributed over replicas.", low=1, high=MAX_DEGREE)
    cfg: int = option(1, "Degree for the branches of classifier-free guidance.", low=1, high=2)
    tp: int = option(1, "Tensor-parallel degree.", low=1, high=MAX_DEGREE)
    ring: int = option(1, "Ring-attention degree.", low=1, high=MAX_DEGREE)
    ulysses: int = option(1, "Ulysses sequence-parallel degree, the innermost axis.", low=1, high=MAX_DEGREE)
    pipe: int = option(
        1,
        "PipeFusion degree: ranks hold consecutive blocks, and patches pass through them; approximate.",
        low=1,
        high=MAX_DEGREE,
    )
    patches: int | None = option(
        None,
        "Patches of PipeFusion. null = as many as its ranks.",
        low=1,
        high=MAX_SIDE,
        reads=("parallel.pipe > 1",),
    )
    displaced: bool = option(
        False, "Use keys and values that the ring's other ranks had one evaluation before; approximate."
    )
    warmup: int = option(
        1,
        "Exact evaluations of an image before the approximate ones.",
        low=1,
        high=MAX_STEPS,
        reads=("parallel.pipe > 1", "parallel.displaced=true"),
    )
    shard_weights: bool = option(
        False, "Shard the denoiser's weights over cfg x ring x ulysses, gathering a block to run it."
    )
    decode: Decode = option(
        Decode.rows,
        "What the ranks of one image shard to decode it; frames sends fewer messages, and only one way.",
    )


@dataclass
class AttentionConfig:
    """Group `attention`: the attention kernel."""

    backend: str = option(
        "auto", "Attention kernel; auto picks one for the device.", words=Names("auto", ATTENTION_BACKENDS)
    )


@dataclass
class BlockCacheConfig:
    """`engine.cache`: the DBCache of engine=cache_dit, which ends some evaluations after the first blocks.

    The defaults are those that SGLang runs it with.
    """

    first_blocks: int = option(
        1, "Blocks computed in every evaluation; their change decides whether the others run.", low=1, high=1_000
    )
    warmup: int = option(4, "Evaluations before the first one that may end early.", low=1, high=MAX_STEPS)
    threshold: float = option(
        0.24,
        "Relative L1 of the change below which the residual of the other blocks is reused.",
        above=0,
        infinite=True,
    )


@dataclass
class EngineConfig:
    """Group `engine`: which implementation generates.

    `native` is this project. `diffusers` is the checkpoint's own pipeline there, on one rank, measured by the same
    code. `cache_dit` is that pipeline with its blocks cached. `sglang` is that pipeline with the network and the loop
    of SGLang-Diffusion.
    """

    name: str = option(
        "native",
        "Engine: this project's, diffusers on one rank, cache_dit (diffusers with cached blocks), or sglang.",
        words=Names(ENGINES),
    )
    optimize: Optimize = option(
        Optimize.auto, "How far the network is optimised. auto = eager if it works. diffusers has none and compile."
    )
    eager: EagerConfig = group(
        EagerConfig, "Parts of optimize=eager.", reads=("engine.optimize=eager", "engine.optimize=compile")
    )
    compile: CompileConfig = group(CompileConfig, "Options of optimize=compile.", reads=("engine.optimize=compile",))
    cache: BlockCacheConfig = group(BlockCacheConfig, "Options of engine=cache_dit.", reads=("engine=cache_dit",))


@dataclass
class WandbConfig:
    """`logger.wandb`: Weights & Biases, a mirror of the record."""

    mode: WandbMode = option(
        WandbMode.auto,
        "When results go there; auto is online if the user is logged in and the server answers, and disabled without "
        "the package wandb.",
    )
    project: str | None = option(None, "Name of the project. null = WANDB_PROJECT, or triptych.")
    entity: str | None = option(None, "User or team of the project. null = WANDB_ENTITY, or your default one.")
    group: str | None = option(
        None, "Name of the group. null = WANDB_RUN_GROUP, or the sweep's folder, or none for a single run."
    )
    name: str | None = option(
        None,
        "Name of the run; in a sweep the values of the varying keys follow it. null = WANDB_NAME, or those values, or "
        "the run's folder.",
    )


@dataclass
class LoggerConfig:
    """Group `logger`: where results go besides the record."""

    table: bool = option(True, "Print the summary table.")
    progress: ProgressMode = option(
        ProgressMode.auto,
        "How progress is shown: lines are one per job of a sweep and one every 30 s, on standard error. auto = bars on "
        "a terminal, lines elsewhere.",
    )
    level: LogLevel = option(
        LogLevel.info,
        "Level of the logs of ranks and servers. The command shows its own on standard error: warnings and errors, or "
        "all with debug.",
        reads=(*LOGGING, "task=serve"),
    )
    wandb: WandbConfig = group(WandbConfig, "Weights & Biases.", reads=(*MIRRORED, "task=report"))


@dataclass
class LaunchConfig:
    """`launch`: how ranks are started."""

    mode: LaunchMode = option(
        LaunchMode.torchrun, "Who starts the ranks; inprocess is one rank in the calling process."
    )
    threads_per_rank: int | None = option(
        None, "CPU threads. null = cores / ranks on this machine (see reproducible).", low=1, high=1_024
    )
    start_timeout_s: float = option(300.0, "Longest time until every rank is ready.", unit="s", low=0, high=MAX_WAIT_S)
    collective_timeout_s: float = option(
        600.0, "Longest wait for another rank in a forward; idle ranks wait for ever.", unit="s", low=1, high=86_400
    )
    stop_timeout_s: float = option(
        10.0, "Time from an orderly shutdown to SIGTERM, and from SIGTERM to SIGKILL.", unit="s", low=0, high=MAX_WAIT_S
    )
    reuse: int | None = option(
        None,
        "Engines kept running between the jobs of a sweep, with their weights; 0 starts fresh ranks for every job. "
        "null = 1, but up to 4 while their weights are under 2 GiB: those of the references too.",
        low=0,
        high=1_000,
    )
    reproducible: bool = option(True, "Equal float32 results at 1, 2, 4 ... threads (strict MKL, no oneDNN).")
    wait_policy: WaitPolicy = option(
        WaitPolicy.auto,
        "How OpenMP's threads wait: default spins for long, adaptive only while no other process uses their "
        "processors, brief for 2000 turns, passive sleeps. auto = adaptive for task=serve and load, else default. "
        "Variables of yours (OMP_WAIT_POLICY) win.",
    )


@dataclass
class RequestConfig:
    """`request`: what to generate."""

    prompt: str | None = option(None, "One prompt.")
    prompts: list[str] | None = option(None, "Several prompts; null here and in prompt = the model's examples.")
    prompts_file: str | None = option(
        None, "File of prompts (.txt, .jsonl, .csv, .tsv); the same as dataset.file.", reads=PROMPTING
    )
    negative_prompt: str | None = option(None, "Prompt that guidance moves away from. null = the model's default.")
    seed: int = option(
        0, "Seed of the first image; image k (over prompts, then samples) uses seed + k.", low=0, high=MAX_SEED
    )
    steps: int | None = option(None, "Solver steps. null = the model's default.", low=1, high=MAX_STEPS)
    guidance: float | None = option(
        None, "Guidance scale, 1 = no guidance. null = the model's default.", low=0, high=MAX_GUIDANCE
    )
    height: int | None = option(
        None, "Height of the image. null = the model's default.", unit="pixels", low=1, high=MAX_SIDE
    )
    width: int | None = option(
        None, "Width of the image. null = the model's default.", unit="pixels", low=1, high=MAX_SIDE
    )
    frames: int | None = option(None, "Frames of a video. null = the model's default.", low=1, high=MAX_FRAMES)
    samples_per_prompt: int = option(1, "Images per prompt.", low=1, high=MAX_IMAGES)
    batch_size: int = option(
        1, "Images per forward; 1 makes an image independent of its neighbours.", low=1, high=MAX_IMAGES
    )


@dataclass
class QualityConfig:
    """`quality`: scores besides the gallery's, on weights (folders of transformers models) or of plug-ins."""

    clip: str | None = option(None, "Folder of a CLIP model for the CLIP score. null = no score.")
    features: str | None = option(
        None, "Folder of a vision model (DINOv2, ViT) for a Frechet distance. null = no distance."
    )
    reference: str | None = option(None, "Folder of the real images for the Frechet distance.")
    metrics: list[str] = option([], "Metrics of plug-ins to measure on the images.", words=Names(METRICS))


@dataclass
class CompareConfig:
    """`compare`: the two configurations of task=compare, or of task=load if it compares, as lists of overrides."""

    a: list[str] | None = option(None, "Overrides of the baseline; [] = the configuration as it is.")
    b: list[str] | None = option(None, "Overrides of the candidate; [] = the configuration as it is.")


@dataclass
class ReportConfig:
    """`report`: the page of task=report."""

    runs: str | None = option(None, "Folder of the runs: a run's, a sweep's, or one above them.")
    out: str | None = option(None, "HTML file to write. null = report.html in report.runs.")


@dataclass
class PluginSource:
    """`plugin_sources.<plug-in>`: the code of one plug-in; the run writes it."""

    version: str = option("", "Version of its package. Empty if it has none.")
    sha256: str = option("", "Hash of its source files.")
    folder: str = option("", "Folder from which it is imported.")


@dataclass
class RunConfig:
    """The whole configuration of one run."""

    plugins: list[str] = option(
        [],
        "Your plug-ins: modules or Python files with a function register(). Installed ones are added.",
        reads=(*PREDICTING, "task=train"),
    )
    plugin: dict[str, Any] = option(
        {}, "Options of what plug-ins registered, by its name.", reads=(*PREDICTING, "task=train")
    )
    plugin_sources: dict[str, PluginSource] = option(
        {}, "Code of the plug-ins, written by the run.", reads=(*PREDICTING, "task=train")
    )

    task: TaskConfig = group(TaskConfig, "What the run does, and how often it is measured.")
    engine: EngineConfig = group(EngineConfig, "Which implementation generates.", reads=GENERATING)
    model: ModelConfig = group(ModelConfig, "Checkpoint and its defaults.", reads=PREDICTING)
    scheduler: SchedulerConfig = group(SchedulerConfig, "Noise scheduler.", reads=(*PREDICTING, "task=train"))
    parallel: ParallelConfig = group(ParallelConfig, "Degrees of the mesh.", reads=GENERATING)
    attention: AttentionConfig = group(AttentionConfig, "Attention kernel.", reads=PREDICTING)
    cache: CacheConfig = group(CacheConfig, "Which evaluations or branches are skipped.", reads=GENERATING)
    stages: list[str] = option(
        [], "Stages of plug-ins that are added to the pipeline.", words=Names(STAGES), reads=GENERATING
    )
    logger: LoggerConfig = group(LoggerConfig, "Where results go besides the record.", reads=LOGGING)
    launch: LaunchConfig = group(LaunchConfig, "How ranks are started.", reads=PREDICTING)
    request: RequestConfig = group(RequestConfig, "What to generate.", reads=PREDICTING)
    dataset: DatasetConfig = group(DatasetConfig, "Prompts from a file.", reads=PROMPTING)
    quality: QualityConfig = group(
        QualityConfig, "Scores on pretrained weights, and metrics.", reads=("task=generate", "task=bench")
    )
    compare: CompareConfig = group(
        CompareConfig, "The two configurations of a comparison.", reads=("task=compare", "task=load")
    )
    train: TrainConfig = group(TrainConfig, "Parts and settings of the training.", reads=("task=train",))
    plan: PlanConfig = group(PlanConfig, "What is predicted.", reads=("task=plan",))
    hardware: HardwareConfig = group(HardwareConfig, "Machine that is predicted for.", reads=("task=plan",))
    report: ReportConfig = group(ReportConfig, "Page of the report.", reads=("task=report",))
    serve: ServeConfig = group(ServeConfig, "The server, and how its engine takes requests.", reads=SERVING)
    load: LoadConfig = group(LoadConfig, "Clients that measure a server, and when they send.", reads=("task=load",))
    tags: list[str] = option([], "Words of yours, for the record and Weights & Biases.")
    notes: str | None = option(None, "A text of yours, for the record and Weights & Biases.")
    meta: dict[str, Any] = option({}, "Keys of yours, for the record: any name below meta, with any value.")
    rerun_of: str | None = option(
        None, "Folder of a run whose record this run is compared with; from=FOLDER sets it.", reads=REPEATING
    )
