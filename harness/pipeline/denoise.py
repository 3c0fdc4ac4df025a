"""Denoising: the solver requests network evaluations, micro-batch by micro-batch, along the grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from harness.messages import DENOISING, CacheSkips
from harness.optimize.precompute import PrecomputedModulation
from harness.parallel.group import Group
from harness.parallel.stale_kv import StaleKVCache
from harness.pipeline.cache_state import CacheState
from harness.pipeline.guidance import Branches, Combine, GuidanceMode, GuidanceSchedule, always_guided, classifier_free
from harness.pipeline.latents import step_noise
from harness.pipeline.preview import decode_preview, preview_steps, to_png
from harness.pipeline.state import Evaluation, RunContext, Sample, WithSolver, micro_batches, require
from models.components import CLASSIFIER_FREE, Conditioning, Decoder, GuidanceRule
from schedulers.grid import Grid, Point
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import Estimate
from schedulers.solvers.base import Noise, SolverState

ConditionAt: TypeAlias = Callable[[Tensor, float], Conditioning]  # of an evaluation's latent and tau
"""Returns the conditioning of an evaluation, from its latent and its time tau."""


@dataclass(frozen=True)
class DenoisingOptions:
    """What evaluations do not compute, or do not compute again.

    Args:
        precompute: precomputes what evaluations share; None if each computes everything.
        guidance_schedule: chooses the evaluations of both guidance branches.
        has_block_cache: whether the network has a block cache, and takes the cache state of each row.
        stale_kv: what the layout stores between the evaluations of a micro-batch; None if they are independent.
        notes: notes for the record of every request.
        mix: the guidance rule.
        decoder: decodes previews; None if there are none.
        with_solver: returns the noise scheduler with the solver that a request names.
    """

    precompute: PrecomputedModulation | None = None
    guidance_schedule: GuidanceSchedule = always_guided
    has_block_cache: bool = False
    stale_kv: StaleKVCache | None = None
    notes: tuple[str, ...] = ()
    mix: Combine = classifier_free
    decoder: Decoder | None = None
    with_solver: WithSolver | None = None


PREVIEW = "preview"
"""The name of a preview's decoding among the times of networks."""
NO_OPTIONS = DenoisingOptions()
"""Every evaluation computes everything."""


class Denoising:
    """Stage 5.

    Args:
        network: (latent, tau, conditioning) to the raw output.
        dtype: the dtype of the network; the state between steps is float32.
        noise_scheduler: the solver and the prediction.
        rule: how the checkpoint is guided.
        cfg: the ranks of the guidance branches; None for this rank alone.
        options: what evaluations do not compute.
    """

    name = DENOISING
    reads = frozenset({"spec", "text", "negative", "grid", "start"})
    writes = frozenset({"latent", "states"})

    def __init__(
        self,
        network: nn.Module,
        dtype: torch.dtype,
        noise_scheduler: NoiseScheduler,
        rule: GuidanceRule = CLASSIFIER_FREE,
        cfg: Group | None = None,
        options: DenoisingOptions = NO_OPTIONS,
    ) -> None:
        self.network = network
        self.dtype = dtype
        self.noise_scheduler = noise_scheduler
        self.rule = rule
        self.cfg = cfg
        self.options = options

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        """Denoise the start of every sample: for each micro-batch, the solver's steps along its grid."""
        options, noise_scheduler = self.options, self.noise_scheduler
        if run.solver:
            noise_scheduler = require(options.with_solver)(run.solver)
        run.notes.extend(options.notes)
        batches = micro_batches(samples, run.batch_size)
        total = sum(require(batch[0].grid).steps for batch in batches)
        for batch in batches:
            if options.stale_kv is not None:
                options.stale_kv.begin()
            grid, x = require(batch[0].grid), torch.stack([require(sample.start) for sample in batch])
            call, solver_state, noise = _NetworkCall(self, batch, run, grid), SolverState(), _noise(batch, x)
            shown = preview_steps(grid.steps, run.previews) if batch[0].spec.index == 0 else frozenset()
            for i in range(grid.steps):
                run.check_cancelled()
                call.begin_step(is_last_step=i == grid.steps - 1)
                with run.clock.step():
                    x = noise_scheduler.step(x, i, grid, call, solver_state, noise)
                if run.keep_states:
                    for sample, state in zip(batch, x, strict=True):
                        sample.states.append(state)
                run.on_progress(self.name, len(run.clock.steps), total)
                if i + 1 in shown:
                    self._preview(require(call.x0), total, run)
            for sample, latent in zip(batch, x, strict=True):
                sample.latent = latent
            if options.has_block_cache or options.guidance_schedule is not always_guided:
                run.skips += call.skips()
            if options.stale_kv is not None:
                run.notes.append(options.stale_kv.end())
        if made := run.clock.evaluations.get(PREVIEW, 0):
            took_ms = run.clock.networks_ms[PREVIEW]
            run.notes.append(f"{made} previews of the first image took {took_ms:.0f} ms of denoising")
        run.require_finite(require(sample.latent) for sample in samples)

    def _preview(self, x0: Tensor, total: int, run: RunContext) -> None:
        """Decode the first row of an x0 estimate, on every rank of the replica, and report it."""
        run.pause()
        with run.clock.network(PREVIEW):
            pixels = decode_preview(require(self.options.decoder), x0)
        if run.on_preview is not None:
            run.on_preview(len(run.clock.steps), total, to_png(pixels))

    def condition_at(self, condition: Conditioning, grid: Grid) -> ConditionAt:
        """Return what gives each evaluation its conditioning, precomputed as far as the options say."""
        if self.options.precompute is None:
            return lambda network_input, tau: condition
        return self.options.precompute.for_batch(condition, grid.tau[:-1].tolist()).at


class _NetworkCall:
    """The network as a solver sees it: (x, point) to an Estimate, with guidance applied to the raw output."""

    def __init__(self, stage: Denoising, batch: list[Sample], run: RunContext, grid: Grid) -> None:
        self._stage, self._batch, self._run = stage, batch, run
        self._branches = Branches(batch, stage.rule, stage.cfg, stage.options.mix)
        self._conditions = {
            mode: stage.condition_at(self._branches.condition_for(mode).to(stage.dtype), grid) for mode in GuidanceMode
        }
        self._kept = tuple(CacheState() for _ in batch)
        self._modes: list[GuidanceMode] = []
        self.x0: Tensor | None = None  # of the latest evaluation, for previews

    def begin_step(self, is_last_step: bool) -> None:
        """Start another solver step."""
        for state in self._kept:
            state.is_last_step = is_last_step

    def __call__(self, x: Tensor, point: Point) -> Estimate:
        stage, branches, run = self._stage, self._branches, self._run
        mode = stage.options.guidance_schedule(len(self._modes), point)
        network_input = branches.duplicate(x * point.c_in, mode).to(stage.dtype)
        tau_B = torch.full((len(network_input),), point.tau, dtype=torch.float32, device=network_input.device)
        rows = self._kept * (len(network_input) // len(self._batch)) if stage.options.has_block_cache else ()
        run.counter.add(len(network_input))
        with run.clock.network("denoiser"):
            condition = self._conditions[mode](network_input, point.tau)
            output = run.evaluate(Evaluation(stage.network, network_input, tau_B, condition, rows))
        if stage.options.has_block_cache and not any(state.computed[-1] for state in self._kept):
            run.clock.discount("denoiser", 1)
        self._modes.append(mode)
        estimate = stage.noise_scheduler.prediction.estimate(branches.combine(output.float(), point, mode), x, point)
        if run.previews:
            self.x0 = estimate.x0
        return estimate

    def skips(self) -> list[CacheSkips]:
        """Return what each image's evaluations skipped, after the last one."""
        skips, rows_requested = [], self._branches.rows_per_image(GuidanceMode.both)
        for sample, state in zip(self._batch, self._kept, strict=True):
            computed = state.computed if self._stage.options.has_block_cache else [True] * len(self._modes)
            skipped = [k for k, done in enumerate(computed) if not done]
            rows = sum(
                self._branches.rows_per_image(mode) for mode, done in zip(self._modes, computed, strict=True) if done
            )
            skips.append(CacheSkips(sample.spec.index, len(computed), skipped, rows_requested * len(computed), rows))
        return skips


def _noise(batch: list[Sample], like: Tensor) -> Noise:
    shape = tuple(like.shape[1:])

    def noise(step: int) -> Tensor:
        return torch.stack([step_noise(sample.spec.seed, step, shape) for sample in batch]).to(like.device)

    return noise
