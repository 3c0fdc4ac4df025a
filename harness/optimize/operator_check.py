"""Watches the networks of a run before they are optimized, and compares what replaced their operators with float64.

harness.optimize.precision has the errors and bounds of linears and convolutions, attention_precision those of
attention kernels, and compiled_precision those of compiled blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from harness.messages import OperatorError
from harness.optimize.attention_precision import (
    AttentionInputs,
    attention_sizes,
    lse_errors,
    output_error,
    random_inputs,
    takes_mask,
)
from harness.optimize.compiled_precision import check_compiled
from harness.optimize.precision import (
    PlainOperator,
    operator_error,
    pattern_of,
    plain_operators,
    replaced_operator,
)
from models.attention import attention_kernel, lse_kernel, resolved_name
from models.components import Components, PromptEncoder, networks_in
from models.plan import ParallelPlan
from models.registry import ATTENTION_BACKENDS

UNUSED_IN_DECODING = ("encoder", "quant_conv")
"""The modules of an autoencoder that no request runs."""
SLOW_MS = 1000.0
"""A check that takes longer gets a note in the record."""


class OperatorCheck:
    """Watches networks before they are optimized, and compares their replaced operators afterwards.

    Args:
        device: the device that computes.
        enabled: whether to compare anything.
        seed: the seed of the random inputs.

    Attributes:
        errors: one row for each distinct operator that was compared.
        not_compared: what was left out, and why.
        duration_ms: the time that it took, ms.
    """

    def __init__(self, device: torch.device, enabled: bool = True, seed: int = 0) -> None:
        self.errors: list[OperatorError] = []
        self.not_compared: list[str] = []
        self.duration_ms = 0.0
        self._device = device
        self._enabled = enabled
        self._generator = torch.Generator().manual_seed(seed)
        self._seed = seed
        self._watched: list[tuple[nn.Module, list[PlainOperator]]] = []
        self._sizes: list[tuple[int, int]] = []
        self._compared: set[tuple[str, torch.dtype]] = set()

    def watch(self, components: Components) -> Components:
        """Remember the operators of loaded components as they are now, and of prompt encoders as they are loaded.

        Args:
            components: the components, before harness.optimize.apply changes them.

        Returns:
            The components to optimize; `compare_loaded` takes what becomes of their load_prompts.
        """
        if not self._enabled:
            return components
        self._sizes = attention_sizes(components.network)
        self._watch_network(components.network)
        for network in networks_in(components.decoder):
            self._watch_network(network, UNUSED_IN_DECODING)
        load, loaded = components.load_prompts, False

        def load_prompts() -> PromptEncoder:
            nonlocal loaded
            encoder = load()
            for network in () if loaded else networks_in(encoder):
                self._watch_network(network)
            loaded = True
            return encoder

        return replace(components, load_prompts=load_prompts)

    def compare_operators(self) -> None:
        """Compare the replaced operators of every network that was watched since the last call."""
        started = time.perf_counter()
        with torch.inference_mode():
            for network, operators in self._watched:
                compiled = {name: module for name, module in network.named_modules() if "forward" in vars(module)}
                check_compiled(list(compiled.values()), self._report)
                for operator in operators:
                    if not any(f"{operator.path}.".startswith(f"{name}." * bool(name)) for name in compiled):
                        self._compare(network, operator)
        self._watched = []
        self.duration_ms += (time.perf_counter() - started) * 1e3

    def compare_loaded(self, load_prompts: Callable[[], PromptEncoder]) -> Callable[[], PromptEncoder]:
        """Return a function that loads prompt encoders and compares them, which may be at the first request only."""

        def load() -> PromptEncoder:
            encoder = load_prompts()
            self.compare_operators()
            return encoder

        return load

    def compare_attention(
        self,
        backend: str,
        with_lse: bool,
        plan: ParallelPlan,
        dtype: torch.dtype,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Compare the attention kernels of the run, with the heads of the watched network.

        Args:
            backend: the name of the attention backend.
            with_lse: whether a ring calls the kernel that also returns the log-sum-exp.
            plan: the network's plan, which says whether there is a mask, and which attention stays out of a ring.
            dtype: the dtype of the network.
            options: the options of the backend.
        """
        if not self._enabled:
            return
        started = time.perf_counter()
        with torch.inference_mode():
            for heads, channels in self._sizes:
                for masked in (False, True) if takes_mask(plan) and ATTENTION_BACKENDS[backend].masks else (False,):
                    inputs = random_inputs(heads, channels, dtype, self._device, masked, self._seed)
                    try:
                        self._compare_kernels(backend, with_lse, bool(plan.local_attention), inputs, options)
                    except NotImplementedError as error:  # the first request will fail with it
                        self._leave_out(f"attention ({error})")
        self.duration_ms += (time.perf_counter() - started) * 1e3

    def notes(self) -> tuple[str, ...]:
        """Return what the record should say of the comparison: what was left out, and a time of over a second."""
        left_out = (f"not compared with float64: {', '.join(self.not_compared)}",) if self.not_compared else ()
        if self.duration_ms <= SLOW_MS:
            return left_out
        took = f"operators were compared with float64 in {self.duration_ms / 1e3:.1f} s, outside of what is timed"
        return (*left_out, took)

    def _watch_network(self, network: nn.Module, unused: Sequence[str] = ()) -> None:
        started = time.perf_counter()
        operators, quantized = plain_operators(network, unused)
        self._watched.append((network, operators))
        if quantized:
            self._leave_out("8-bit linears")
        self.duration_ms += (time.perf_counter() - started) * 1e3

    def _report(self, row: OperatorError | str) -> None:
        """Take the row of a compiled module, or why there is none."""
        if isinstance(row, str):
            self._leave_out(row)
        else:
            self.errors.append(row)

    def _leave_out(self, what: str) -> None:
        if what not in self.not_compared:
            self.not_compared.append(what)

    def _compare_kernels(
        self, backend: str, with_lse: bool, local: bool, inputs: AttentionInputs, options: Mapping[str, Any] | None
    ) -> None:
        name = resolved_name(backend, self._device.type, with_lse, options)
        if ATTENTION_BACKENDS[backend].approximate:
            self._leave_out(f"approximate attention ({name})")
            return
        if with_lse:
            self.errors += lse_errors(name, lse_kernel(backend, options), inputs)
        if local or not with_lse:
            name = resolved_name(backend, self._device.type, options=options)
            self.errors.append(output_error(name, attention_kernel(backend, options), inputs))

    def _compare(self, network: nn.Module, operator: PlainOperator) -> None:
        replaced = replaced_operator(network, operator)
        weight = next(operator.plain.parameters())
        if replaced is None or (replaced.name, weight.dtype) in self._compared:
            return
        self._compared.add((replaced.name, weight.dtype))
        if weight.device.type != self._device.type:
            self._leave_out("weights that are not on the device yet")
            return
        rel_l2, bound = operator_error(operator, replaced, self._generator)
        dtype = str(weight.dtype).removeprefix("torch.")
        self.errors.append(OperatorError(f"{replaced.name}, {pattern_of(operator.path)}", dtype, rel_l2, bound))
