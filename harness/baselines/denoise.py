"""Denoising with a diffusers pipeline: its own loop, observed through hooks on its network."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.baselines.cache_dit import DBCache
from harness.baselines.model import BaselineModel, PipelineBatch
from harness.baselines.noise_scheduler import MakeScheduler, adds_noise
from harness.pipeline.guidance import needs_negative
from harness.pipeline.latents import seeded_noise, step_noise
from harness.pipeline.state import RunContext, Sample, micro_batches, require
from harness.pipeline.timesteps import image_tokens
from models.components import Conditioning, GuidanceRule, LatentSpace
from schedulers.diffusers_adapter import evaluation_points
from schedulers.noise_scheduler import NoiseScheduler

SDPA_BACKENDS = {"sdpa_math": SDPBackend.MATH, "sdpa_flash": SDPBackend.FLASH_ATTENTION}
"""PyTorch's kernels by their names in harness.resolve.engines_table, for layers that call its attention themselves."""


class NoisePreparation:
    """Stage 4: standard normal noise, which the pipeline scales itself.

    Args:
        space: the geometry of the state.
    """

    name = "latent_preparation"
    reads = frozenset({"spec"})
    writes = frozenset({"start"})

    def __init__(self, space: LatentSpace) -> None:
        self.space = space

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        """Set each sample's initial noise from its seed."""
        for sample in samples:
            spec = sample.spec
            sample.start = seeded_noise(spec.seed, self.space.shape(spec.height, spec.width, spec.frames)).to(
                run.device
            )


class BaselineDenoising:
    """Stage 5: denoising with the pipeline's own loop.

    Args:
        model: the pipeline.
        make_scheduler: a function that makes the noise scheduler of a micro-batch.
        noise_scheduler: the noise scheduler of a native run, whose solver steps are counted.
        rule: the checkpoint's guidance rule.
        attention: the attention's name in harness.resolve.engines_table.
        size_multiple: the pixels that a token of the network spans on a side.
        has_own_noise: whether the noise of the steps is diffusers' own.
        cache: the cache of the network's blocks, if there is one.
        notes: the notes for the record of every request.
    """

    name = "denoising"
    reads = frozenset({"spec", "text", "negative", "grid", "start"})
    writes = frozenset({"latent"})

    def __init__(
        self,
        model: BaselineModel,
        make_scheduler: MakeScheduler,
        noise_scheduler: NoiseScheduler,
        rule: GuidanceRule,
        attention: str,
        size_multiple: int,
        has_own_noise: bool,
        cache: DBCache | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.make_scheduler = make_scheduler
        self.noise_scheduler = noise_scheduler
        self.rule = rule
        self.attention = attention
        self.size_multiple = size_multiple
        self.has_own_noise = has_own_noise
        self.cache = cache
        self.notes = notes

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        """Denoise all samples, one micro-batch after another."""
        run.notes.extend(self.notes)
        batches = micro_batches(samples, run.batch_size)
        total = sum(require(batch[0].grid).steps for batch in batches)
        for batch in batches:
            self._denoise(batch, run, total)

    def _denoise(self, samples: list[Sample], run: RunContext, total: int) -> None:
        if run.keep_states:
            raise ValueError("diffusers' pipelines return no state after each step; use latents=last")
        grid, spec = require(samples[0].grid), samples[0].spec
        if self.has_own_noise and adds_noise(self.noise_scheduler, grid):
            run.notes.append("the noise of each step is diffusers' own: images differ from those of engine=native")
        is_guided = needs_negative(spec, self.rule)
        batch = PipelineBatch(
            [sample.spec for sample in samples],
            torch.stack([require(sample.start) for sample in samples]),
            Conditioning.stack([require(sample.text) for sample in samples]),
            Conditioning.stack([require(sample.negative) for sample in samples]) if is_guided else None,
        )

        def noise(step: int) -> Tensor:
            shape = tuple(batch.noise.shape[1:])
            return self.model.pack(torch.stack([step_noise(spec.seed, step, shape) for spec in batch.specs])).to(
                run.device
            )

        self.model.pipeline.scheduler = self.make_scheduler(
            image_tokens(spec.height, spec.width, self.size_multiple), noise
        )
        evaluations = [len(points) for points in evaluation_points(self.noise_scheduler, grid)]
        forwards = 2 if is_guided and self.model.separate_guidance else 1
        if self.cache is not None:
            self.cache.begin(separate_guidance=forwards == 2)
        with attention_context(self.attention), NetworkTimer(self.model.network, run, evaluations, forwards, total):
            latents = self.model.denoise(batch)
        if self.cache is not None:
            skips = self.cache.skips()
            run.clock.discount("denoiser", len(skips.skipped))
            run.notes.append(skips.note(sum(evaluations)))
        for sample, latent in zip(samples, latents.float(), strict=True):
            sample.latent = latent


def attention_context(attention: str) -> AbstractContextManager[object]:
    """Return a context in which the attention with this name in harness.resolve.engines_table runs."""
    if attention == "sdpa":
        return ExitStack()
    if attention in SDPA_BACKENDS:
        return sdpa_kernel(SDPA_BACKENDS[attention])
    found: AbstractContextManager[object] = attention_backend(attention)
    return found


class NetworkTimer:
    """Times a pipeline's network and steps from outside: a step lasts from its first forward to that of the next.

    What comes before the first forward belongs to the stage and to no step. Cancellation is checked at the start of
    each step.

    Args:
        network: the denoiser.
        run: the run context of the request.
        evaluations: the network evaluations of each solver step.
        forwards: the forwards of one evaluation; a guided pair counts as one evaluation.
        total: the solver steps of the request, for its progress.
    """

    def __init__(self, network: nn.Module, run: RunContext, evaluations: list[int], forwards: int, total: int) -> None:
        self.network = network
        self.run = run
        self.forwards = forwards
        self.total = total
        self._begins = {sum(evaluations[:i]) for i in range(len(evaluations))}
        self._done = 0
        self._step = ExitStack()
        self._forward = ExitStack()

    def __enter__(self) -> None:
        self._hooks = (
            self.network.register_forward_pre_hook(self._before),
            self.network.register_forward_hook(self._after),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if error is None:
            self._end_step()

    def _before(self, network: nn.Module, given: object) -> None:
        evaluation, part = divmod(self._done, self.forwards)
        if part == 0 and evaluation in self._begins:
            self._end_step()
            self.run.check_cancelled()
            self._step.enter_context(self.run.clock.step())
        self._forward.enter_context(self.run.clock.network("denoiser", counted=part == 0))

    def _after(self, network: nn.Module, given: object, output: object) -> None:
        self._forward.close()
        self._done += 1

    def _end_step(self) -> None:
        if self._done:
            self._step.close()
            self.run.on_progress("denoising", len(self.run.clock.steps), self.total)
