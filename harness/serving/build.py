"""From a configuration to a worker: device, components, noise scheduler, stages. The one place that joins them."""

from __future__ import annotations

import importlib

import torch

from harness.config.schema import Load, RunConfig
from harness.config.trained import trained_denoiser
from harness.metrics.cuda import CudaMemory
from harness.metrics.memory import Memory, ResidentMemory
from harness.parallel.mesh import Place
from harness.pipeline.composed import ComposedPipeline
from harness.pipeline.decode import Decoding
from harness.pipeline.denoise import Denoising
from harness.pipeline.executor import SyncExecutor
from harness.pipeline.latents import LatentPreparation
from harness.pipeline.settings import noise_scheduler_settings
from harness.pipeline.text import TextEncoding
from harness.pipeline.timesteps import TimestepPreparation
from harness.pipeline.validate import InputValidation
from harness.serving.worker import Worker
from models.attention import attention_kernel
from models.components import ComponentLoader
from models.registry import ARCHITECTURES, checkpoint_folder
from schedulers.build import build as build_noise_scheduler


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this rank where there is one, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def prepare_cpu(config: RunConfig, threads: int) -> None:
    """Sets threads, and where float32 results shall not depend on their number, takes oneDNN out of the way.

    oneDNN picks another blocking, and so another order of additions, for another number of threads (seen with a 1 x 1
    convolution at batch 1); the plain convolutions end in MKL products, which strict mode (MKL_CBWR, set by the
    launcher) makes equal.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.backends.mkldnn.set_flags(not (config.launch.reproducible and config.model.dtype.name == "float32"))


def build_worker(config: RunConfig, place: Place, device: torch.device) -> Worker:
    """Loads the components on the device and composes the pipeline.

    Raises:
        CheckpointError: weights that are missing, broken or do not fit.
        ValueError: settings that do not go together.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = config.model
    dtype = getattr(torch, model.dtype.name)
    load: ComponentLoader = importlib.import_module(ARCHITECTURES[model.architecture].module).load
    parts = load(
        checkpoint_folder(model.name, model.path),
        trained_denoiser(config).weights,
        attention_kernel(config.attention.backend),
        dtype,
        device,
        model.text_tokens,
        model.load is Load.dummy,
    )
    if model.size_multiple % parts.size_multiple:
        raise ValueError(
            f"model.size_multiple={model.size_multiple}, but this checkpoint draws multiples of {parts.size_multiple} "
            f"pixels; set model.size_multiple={parts.size_multiple}"
        )
    noise_scheduler = build_noise_scheduler(noise_scheduler_settings(config.scheduler))
    pipeline = ComposedPipeline(
        InputValidation(model.size_multiple, model.max_pixels, noise_scheduler),
        [
            TextEncoding(parts.text),
            TimestepPreparation(noise_scheduler, parts.size_multiple),
            LatentPreparation(parts.latent_channels, parts.latent_stride, noise_scheduler),
            Denoising(parts.network, dtype, noise_scheduler),
            Decoding(parts.decoder),
        ],
        SyncExecutor(),
    )
    memory: Memory = CudaMemory(device) if device.type == "cuda" else ResidentMemory()
    return Worker(pipeline, place, device, memory)
