"""From a configuration to a worker: device, components, noise scheduler, stages. The one place that joins them."""

from __future__ import annotations

import importlib.util
import os

import torch

from harness.build.native import native_pipeline
from harness.build.parts import source_of
from harness.config.schema import RunConfig, Task
from harness.device.cuda import CudaEnergy, CudaMemory, synchronizer
from harness.device.device import denoiser_dtype, prepare_cuda, torch_dtype
from harness.device.energy import Energy, NoEnergy, PackageEnergy
from harness.device.flops import ceiling_tflops
from harness.device.memory import Memory, ResidentMemory
from harness.messages import LoadedComponent
from harness.optimize.widen import widens
from harness.parallel.connect import one_rank
from harness.parallel.mesh import Place
from harness.resolve.engines_table import NATIVE
from harness.serving.worker import Worker


def ceiling(config: RunConfig, device: torch.device) -> float:
    """The rate of a matrix product on this rank in the denoiser's dtype, or in float32 where that is how it is computed
    best, TFLOP/s; 0 where nothing is measured.
    """
    if config.task.name is not Task.bench:
        return 0.0
    dtype = torch_dtype(denoiser_dtype(config.model))
    return ceiling_tflops(device, torch.float32 if widens(device, dtype) else dtype, synchronizer(device))


def build_worker(config: RunConfig, place: Place, device: torch.device) -> Worker:
    """Loads the components on the device and composes the pipeline.

    Raises:
        CheckpointError: weights that are missing, broken or do not fit.
        ValueError: settings that do not go together.
    """
    if device.type == "cuda":
        prepare_cuda(device)
    source = source_of(config, device)
    if config.engine.name == NATIVE:
        pipeline, axes = native_pipeline(config, source, place)
    else:
        from harness.build.baseline import baseline_pipeline  # brings diffusers' pipelines

        pipeline, axes = baseline_pipeline(config, source), one_rank()
    memory: Memory = CudaMemory(device) if device.type == "cuda" else ResidentMemory()
    memory.release()  # of what loading took and left
    energy = energy_meter(device)
    loaded = [
        LoadedComponent(p.component, str(p.path), p.dtype, p.parameters, p.bytes, p.load_ms, p.merged, p.read_bytes)
        for p in source.loaded.values()
    ]
    return Worker(pipeline, place, device, memory, loaded, axes, energy)


def energy_meter(device: torch.device) -> Energy:
    """Of a GPU where NVML is installed; of the machine's processors on its first rank."""
    if device.type == "cuda":
        return CudaEnergy(device) if importlib.util.find_spec("pynvml") else NoEnergy()
    return PackageEnergy() if os.environ.get("LOCAL_RANK", "0") == "0" else NoEnergy()
