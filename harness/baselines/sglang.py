"""engine=sglang: SGLang-Diffusion's own network in its own denoising loop, between the stages of engine=diffusers.

SGLang provides the loading of the network, its inputs (rotary tables, guidance, masks), the forward context and
attention layer around it, the combination of two guided forwards, and the loop (github.com/sgl-project/sglang,
python/sglang/multimodal_gen: TransformerLoader, LatentPreparationStage, TimestepPreparationStage, DenoisingStage). Text
encoding, decoding, the initial noise and the noise scheduler are those of engine=diffusers, so that both generate the
same image. A diffusers class that the checkpoint names is replaced with SGLang's version of it.

Its loader is called in a way that has no fallback to diffusers' network, which SGLang's pipeline would use silently.
Importing this module imports SGLang, which takes half a minute and chooses its platform.
"""

from __future__ import annotations

import importlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors.torch import save_file
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.distributed.parallel_state import (
    maybe_init_distributed_environment_and_model_parallel,
)
from sglang.multimodal_gen.runtime.loader.component_loaders.transformer_loader import TransformerLoader
from sglang.multimodal_gen.runtime.managers.memory_managers.component_manager import ComponentResidencyManager
from sglang.multimodal_gen.runtime.models.registry import ModelRegistry
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.latent_preparation import LatentPreparationStage
from sglang.multimodal_gen.runtime.pipelines_core.stages.timestep_preparation import TimestepPreparationStage
from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args
from torch import Tensor, nn
from tqdm.auto import tqdm

from harness.baselines.model import BaselineModel, PipelineBatch
from harness.baselines.noise_scheduler import MakeScheduler, PipelineScheduler
from harness.pipeline.timesteps import image_tokens
from harness.resolve.engines_table import SglangRow
from models.checkpoint_source import CheckpointSource
from models.components import Components, Conditioning
from models.files import CheckpointError
from schedulers.diffusers_adapter import DiffusersAdapter

CONFIGS = "sglang.multimodal_gen.configs.pipeline_configs"
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class ResidentPipeline:
    """The pipeline for SGLang's memory manager: one network, which stays on its device."""

    modules: dict[str, nn.Module]
    component_residency_strategies: dict[str, object] = field(default_factory=dict)
    _stage_name_mapping: dict[str, object] = field(default_factory=dict)


class QuietDenoising(DenoisingStage):  # type: ignore[misc]
    """SGLang's loop without a progress bar, since a rank's log is a file."""

    def progress_bar(self, total: int, batch: Req) -> tqdm[None]:
        """Return a disabled progress bar."""
        return tqdm(total=total, disable=True)


class SglangDenoiser:
    """SGLang's three stages around its network.

    Args:
        row: the SGLang settings of the architecture.
        args: SGLang's server arguments, which its stages also read globally.
        network: SGLang's network.
        model: the pipeline whose noise scheduler is set before each micro-batch.
        size_multiple: the pixels that a token of the network spans on a side.
    """

    def __init__(
        self, row: SglangRow, args: ServerArgs, network: nn.Module, model: BaselineModel, size_multiple: int
    ) -> None:
        self.row = row
        self.args = args
        self.model = model
        self.size_multiple = size_multiple
        denoising = QuietDenoising(network, None)
        denoising.set_component_residency_manager(
            ComponentResidencyManager(ResidentPipeline({"transformer": network}), args)
        )
        timesteps = TimestepPreparationStage(None, [lambda batch, args: ("mu", batch.extra["mu"])])
        self.stages = [LatentPreparationStage(None, network), timesteps, denoising]

    def __call__(self, batch: PipelineBatch) -> Tensor:
        """Run SGLang's loop and return latents of the noise's shape."""
        config, dtype = self.args.pipeline_config, batch.text.require_prompt_embeds().dtype
        config.embedded_cfg_scale = batch.spec.guidance
        request = self._request(batch)
        shape = config.prepare_latent_shape(request, len(batch.specs), 1)
        request.latents = batch.noise.reshape(shape).to(config.get_latent_dtype(dtype))
        for stage in self.stages:
            request = stage(request, self.args)
        latents: Tensor = request.latents
        return latents.reshape(batch.noise.shape)

    def _request(self, batch: PipelineBatch) -> Req:
        spec, negative = batch.spec, batch.negative
        sampling_params = SamplingParams(
            negative_prompt=None,
            height=spec.height,
            width=spec.width,
            num_frames=1,
            num_inference_steps=spec.steps,
            guidance_scale=spec.guidance - 1 + self.row.no_guidance,
        )
        noise_scheduler = sglang_scheduler(self.model.pipeline.scheduler)
        request = Req(
            sampling_params=sampling_params,
            prompt_embeds=[batch.text.require_prompt_embeds()] * self.row.encodings,
            pooled_embeds=_vectors(batch.text),
            prompt_seq_lens=[_lengths(batch.text)] * self.row.encodings,
            do_classifier_free_guidance=negative is not None,
            generator=torch.Generator(),
            scheduler=noise_scheduler,
            extra={
                "mu": timestep_shift(noise_scheduler.config, image_tokens(spec.height, spec.width, self.size_multiple))
            },
        )
        if negative is not None:
            request.negative_prompt_embeds = [negative.require_prompt_embeds()] * self.row.encodings
            request.neg_pooled_embeds = _vectors(negative)
            request.negative_prompt_seq_lens = [_lengths(negative)] * self.row.encodings
        return request


def with_sglang(
    model: BaselineModel, row: SglangRow, source: CheckpointSource, parts: Components, make_scheduler: MakeScheduler
) -> BaselineModel:
    """Return a diffusers pipeline with SGLang's network and loop in place of its own, whose memory is freed.

    Args:
        model: diffusers' pipeline.
        row: the SGLang settings of the architecture.
        source: the checkpoint.
        parts: the native components on the meta device.
        make_scheduler: a function that makes the noise scheduler of a micro-batch.

    Raises:
        CheckpointError: SGLang cannot load the network by itself.
        ValueError: SGLang has no such noise scheduler.
    """
    sglang_scheduler(make_scheduler(1, torch.zeros))
    start, component = perf_counter(), source.denoiser
    with preserve_logging(), tempfile.TemporaryDirectory() as folder:
        read_bytes = write_loader_folder(Path(folder), source, model.network, row)
        for parameter in model.network.parameters():
            parameter.data = parameter.new_empty(0)
        args = make_server_args(row, source, parts, folder)
        try:
            network = TransformerLoader().load_customized(folder, args, "transformer")
        except Exception as error:  # any exception: SGLang itself would fall back to diffusers' network
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{source.config_folder(component)}: SGLang-Diffusion cannot load {component} by itself ({line}); use "
                "engine=diffusers"
            ) from error
        denoiser = SglangDenoiser(row, args, network, model, parts.size_multiple)
    network.requires_grad_(False).eval()
    source.record(component, network, start, source.loaded[component].merged, read_bytes)
    return replace(model, network=network, denoise=denoiser, separate_guidance=True)


def write_loader_folder(folder: Path, source: CheckpointSource, network: nn.Module, row: SglangRow) -> int:
    """Write the folder for SGLang's loader: a config.json with SGLang's names, and the weights.

    The weights are links to the checkpoint's files. A network whose values differ from the files (random weights, or
    merged updates) gets a copy of its own.

    Args:
        folder: the folder to write to; it exists.
        source: the checkpoint.
        network: the network whose weights are copied, if they are.
        row: the SGLang settings of the architecture.

    Returns:
        The bytes of the checkpoint's files; 0 for a copy.
    """
    config = source.config(source.denoiser)
    config |= {theirs: config[ours] for ours, theirs in row.renamed.items() if ours in config}
    (folder / "config.json").write_text(json.dumps(config))
    if source.dummy or source.loras:
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / WEIGHTS)
        return 0
    files = source.weights(source.denoiser)
    for file in files:
        (folder / file.name).symlink_to(file.resolve())
    return sum(file.stat().st_size for file in files)


def make_server_args(row: SglangRow, source: CheckpointSource, parts: Components, folder: str) -> ServerArgs:
    """Return SGLang's server arguments for one rank, also set globally, and create its groups of ranks."""
    module, name = row.config.split(":")
    kind: type[PipelineConfig] = getattr(importlib.import_module(f"{CONFIGS}.{module}"), name)
    config = kind(dit_precision=PRECISIONS[source.dtype_of(source.denoiser)])
    geometry = config.vae_config.arch_config
    geometry.vae_scale_factor = geometry.spatial_compression_ratio = parts.latent.stride
    args = ServerArgs(
        model_path=folder, pipeline_config=config, num_gpus=1, attention_backend="torch_sdpa", log_level="error"
    )
    set_global_server_args(args)
    if not dist.is_initialized():  # the rank runs in the user's own process
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    maybe_init_distributed_environment_and_model_parallel(tp_size=1, sp_size=1)
    logging.getLogger("sglang").setLevel(logging.WARNING)  # otherwise it logs every stage
    return args


@contextmanager
def preserve_logging() -> Iterator[None]:
    """Restore the root logger on exit, since SGLang's server arguments reconfigure it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def sglang_scheduler(scheduler: PipelineScheduler) -> PipelineScheduler:
    """Return SGLang's version of a diffusers class, which its loop requires, or a noise scheduler of ours unchanged.

    Args:
        scheduler: a diffusers noise scheduler, or ours behind the same interface.

    Raises:
        ValueError: SGLang has no such class.
    """
    if isinstance(scheduler, DiffusersAdapter):
        return scheduler
    name = type(scheduler).__name__
    if name not in ModelRegistry.get_supported_archs():
        raise ValueError(
            f"SGLang-Diffusion has no {name}, which this checkpoint names; choose scheduler=rectified_flow, or "
            "engine=diffusers"
        )
    kind: type[SchedulerMixin] = ModelRegistry.resolve_model_cls(name)[0]
    return kind.from_config(scheduler.config)


def timestep_shift(config: Mapping[str, object], size: int) -> float | None:
    """Return the shift for an image of `size` tokens, as diffusers' pipelines read it from the scheduler's file."""
    if not config.get("use_dynamic_shifting"):
        return None
    mu: float = calculate_shift(
        size,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    return mu


def _vectors(text: Conditioning) -> list[Tensor]:
    return [] if text.pooled is None else [text.pooled]


def _lengths(text: Conditioning) -> list[int]:
    embeds = text.require_prompt_embeds()
    lengths: list[int] = [embeds.shape[1]] * len(embeds) if text.mask is None else text.mask.sum(1).tolist()
    return lengths
