"""Compares a compiled module with the same module in float64, on the inputs of its first compiled call.

A graph is made for one dtype, so a run in bfloat16 has code that no float32 run has. The first block of each kind is
computed three times: compiled, uncompiled in the same dtype, and uncompiled in float64 from the same rounded inputs and
weights. What counts is what a block adds to its tokens. The compiled error may be 1.5 times the uncompiled one, or
1e-5, which is what float32 makes. A graph rounds less often: over the blocks of seven tiny transformers, its error in
bfloat16 was 0.7 to 1.0 of the uncompiled one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.messages import OperatorError
from harness.metrics.fidelity import ROUNDING
from harness.optimize.precision import copy_module, relative_error

UNCOMPILED = 1.5
"""The largest error, over that of the uncompiled module in the same dtype."""
MAX_PARAMETERS = 1 << 30
"""A larger module is not compared: its weights in float64 would take over 8 GiB."""


class CheckedForward:
    """The compiled forward of a module, which is compared at its first compiled call, and then alone again.

    Args:
        module: the module.
        compiled: the compiled forward.
        report: called with the row, or with what was left out and why.
    """

    def __init__(
        self, module: nn.Module, compiled: Callable[..., Any], report: Callable[[OperatorError | str], None]
    ) -> None:
        self._module = module
        self._compiled = compiled
        self._report = report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the compiled outputs."""
        if torch._dynamo.eval_frame._stance.stance == "force_eager":  # operations are counted, uncompiled
            return self._compiled(*args, **kwargs)
        given = map_tensors((args, kwargs), torch.clone)
        outputs = self._compiled(*args, **kwargs)
        self._module.forward = self._compiled
        try:
            self._report(compiled_error(self._module, map_tensors(outputs, torch.clone), *given))
        except NotImplementedError as error:  # a kernel without float64
            self._report(f"compiled {type(self._module).__name__} ({error})")
        return outputs


class StayInFloat64(TorchFunctionMode):
    """A mode in which `x.float()`, which a forward may use for its sums, leaves a float64 tensor as it is."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch."""
        if function is Tensor.float and args[0].dtype is torch.float64:
            return args[0]
        return function(*args, **(kwargs or {}))


def check_compiled(modules: Sequence[nn.Module], report: Callable[[OperatorError | str], None]) -> None:
    """Have the first module of each kind compared at its first compiled call.

    Args:
        modules: modules, of which some have a compiled forward.
        report: called with the row of each, or with what was left out and why.
    """
    seen = set()
    for module in modules:
        shapes = tuple((name, tuple(weight.shape)) for name, weight in module.named_parameters())
        if "forward" not in vars(module) or (type(module), shapes) in seen:
            continue
        seen.add((type(module), shapes))
        if sum(weight.numel() for weight in module.parameters()) > MAX_PARAMETERS:
            report(f"compiled {type(module).__name__} (too large for a copy in float64)")
        else:
            module.forward = CheckedForward(module, module.forward, report)


def compiled_error(module: nn.Module, outputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OperatorError:
    """Return the error of a compiled module's outputs, for the worst of them, and its bound.

    Args:
        module: the module, whose class has the uncompiled forward.
        outputs: what the compiled forward returned.
        args: the positional arguments it was called with.
        kwargs: the others, of which the first are its tokens, in the order of the outputs.
    """
    plain = type(module).forward
    eager = _tensors(plain(module, *args, **kwargs))
    exact_args, exact_kwargs = map_tensors((args, kwargs), _to_double)
    with StayInFloat64():
        exact = _tensors(plain(copy_module(module, _to_double), *exact_args, **exact_kwargs))
    tokens = [*exact_kwargs.values()]
    rows = []
    for i, (made, uncompiled, wanted) in enumerate(zip(_tensors(outputs), eager, exact, strict=True)):
        is_stream = i < len(tokens) and isinstance(tokens[i], Tensor) and tokens[i].shape == wanted.shape
        start = tokens[i] if is_stream else torch.zeros_like(wanted)
        error, least = (relative_error(each.double() - start, wanted - start) for each in (made, uncompiled))
        rows.append((error, max(ROUNDING, UNCOMPILED * least)))
    error, bound = max(rows, key=lambda row: row[0] / row[1])
    dtype = str(eager[0].dtype).removeprefix("torch.")
    return OperatorError(f"compiled {type(module).__name__}", dtype, error, bound)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a value in which every tensor inside tuples, lists, dicts and dataclasses is changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), change) for f in fields(value) if f.init})
    return value


def _to_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _tensors(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]
