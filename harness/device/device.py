"""The device of a rank, chosen and prepared, and the dtypes of its networks."""

from __future__ import annotations

import torch

from harness.config.schema import DType, ModelConfig, RunConfig


def pick_device(local_rank: int) -> torch.device:
    """Return the GPU of this rank if there is one, else the CPU."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def prepare_cpu(config: RunConfig, threads: int) -> None:
    """Set the threads, and disable oneDNN if float32 results must not depend on their number.

    oneDNN chooses another blocking, and so another order of additions, for another number of threads (seen with a 1 x 1
    convolution at batch 1). The plain convolutions end in MKL products, which strict mode (MKL_CBWR, set by the
    launcher) makes equal.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    plain = denoiser_dtype(config.model) is DType.float32
    torch.backends.mkldnn.set_flags(not (config.launch.reproducible and plain))


def prepare_cuda(device: torch.device) -> None:
    """Select the GPU and disable TF32.

    PyTorch would otherwise reduce convolutions to 10 bits of float32's 23-bit mantissa.
    """
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def denoiser_dtype(model: ModelConfig) -> DType:
    """Return the dtype in which the denoiser is loaded."""
    return model.denoiser.dtype or model.dtype


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return PyTorch's dtype for a configured one."""
    found: torch.dtype = getattr(torch, dtype.name)
    return found
