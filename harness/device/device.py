"""The device of a rank, chosen and prepared, and the dtypes computed in."""

from __future__ import annotations

import torch

from harness.config.schema import DType, ModelConfig, RunConfig


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
    plain = denoiser_dtype(config.model) is DType.float32
    torch.backends.mkldnn.set_flags(not (config.launch.reproducible and plain))


def prepare_cuda(device: torch.device) -> None:
    """Takes the GPU, whose convolutions PyTorch would cut to 10 bits of float32's 23: float32 is to be float32."""
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def denoiser_dtype(model: ModelConfig) -> DType:
    """What the denoiser is loaded in."""
    return model.denoiser.dtype or model.dtype


def torch_dtype(dtype: DType) -> torch.dtype:
    """PyTorch's own of a configured dtype."""
    found: torch.dtype = getattr(torch, dtype.name)
    return found
