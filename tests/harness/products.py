"""Which products a computation makes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.optimize.upcast import FEW_ROWS

PRODUCTS = {"addmm", "mm", "bmm", "baddbmm", "linear", "matmul", "convolution", "conv1d", "conv2d", "conv3d"}


class Products(TorchDispatchMode):
    """The dtypes that products are computed in, but for those of few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            x = next(a for a in args if isinstance(a, Tensor) and a.ndim > 1)
            if x.numel() >= FEW_ROWS * x.shape[-1]:
                self.dtypes.append(x.dtype)
        return func(*args, **(kwargs or {}))
