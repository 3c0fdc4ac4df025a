"""Denoising: the solver pulls network evaluations, micro-batch by micro-batch, down the grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from harness.messages import CacheSkips
from harness.optimize.ahead import Ahead
from harness.parallel.group import Group
from harness.parallel.stale import Stale
from harness.pipeline.cache_state import History
from harness.pipeline.guidance import Branches, Way, When, always
from harness.pipeline.latents import step_noise
from harness.pipeline.state import RunContext, Sample, micro_batches, written
from models.components import CLASSIFIER_FREE, Conditioning, GuidanceRule
from schedulers.grid import Grid, Point
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import Estimate
from schedulers.solvers.base import Memory, Noise

Tell: TypeAlias = Callable[[Tensor, float], Conditioning]  # of an evaluation's latent and tau


@dataclass(frozen=True)
class Savings:
    """What an evaluation does not compute, or not again.

    Args:
        ahead: computes what evaluations share beforehand; None where each computes all.
        when: which evaluations are of both branches.
        gated: the network's blocks are behind gates, and it is told whose rows it is given.
        stale: what the layout keeps between the evaluations of a micro-batch; None where those are independent.
        notes: for the record of every request.
    """

    ahead: Ahead | None = None
    when: When = always
    gated: bool = False
    stale: Stale | None = None
    notes: tuple[str, ...] = ()


NOTHING = Savings()


class Denoising:
    """Stage 5.

    Args:
        network: (latent, tau, conditioning) to the raw output.
        dtype: the network's; the state between steps is float32.
        noise_scheduler: solver and prediction.
        rule: how the checkpoint is guided.
        cfg: the ranks of the guidance branches; None for this rank alone.
        savings: what an evaluation does not compute.
    """

    name = "denoising"
    reads = frozenset({"ask", "text", "negative", "grid", "start"})
    writes = frozenset({"latent", "states"})

    def __init__(
        self,
        network: nn.Module,
        dtype: torch.dtype,
        noise_scheduler: NoiseScheduler,
        rule: GuidanceRule = CLASSIFIER_FREE,
        cfg: Group | None = None,
        savings: Savings = NOTHING,
    ) -> None:
        self.network = network
        self.dtype = dtype
        self.noise_scheduler = noise_scheduler
        self.rule = rule
        self.cfg = cfg
        self.savings = savings

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        run.notes.extend(self.savings.notes)
        batches = micro_batches(samples, run.batch_size)
        total = sum(written(batch[0].grid).steps for batch in batches)
        for batch in batches:
            if self.savings.stale is not None:
                self.savings.stale.begin()
            self._denoise(batch, run, total)
            if self.savings.stale is not None:
                run.notes.append(self.savings.stale.end())

    def _denoise(self, batch: list[Sample], run: RunContext, total: int) -> None:
        grid = written(batch[0].grid)
        x = torch.stack([written(sample.start) for sample in batch])
        call, memory, noise = _NetworkCall(self, batch, run, grid), Memory(), _noise(batch, x)
        for i in range(grid.steps):
            run.check_cancelled()
            call.begin_step(final=i == grid.steps - 1)
            with run.clock.step():
                x = self.noise_scheduler.step(x, i, grid, call, memory, noise)
            if run.keep_states:
                for sample, state in zip(batch, x, strict=True):
                    sample.states.append(state)
            run.on_progress(self.name, len(run.clock.steps), total)
        for sample, latent in zip(batch, x, strict=True):
            sample.latent = latent
        if self.savings.gated or self.savings.when is not always:
            run.skips += call.skips()

    def tell(self, condition: Conditioning, grid: Grid) -> Tell:
        """What an evaluation is told: the conditioning, with what is computed beforehand where anything is."""
        if self.savings.ahead is None:
            return lambda fed, tau: condition
        return self.savings.ahead.request(condition, grid.tau[:-1].tolist()).at


class _NetworkCall:
    """The network as a solver sees it: (x, point) to an Estimate, guidance applied to the raw output."""

    def __init__(self, stage: Denoising, batch: list[Sample], run: RunContext, grid: Grid) -> None:
        self._stage, self._batch, self._run = stage, batch, run
        self._branches = Branches(batch, stage.rule, stage.cfg)
        self._told = {way: stage.tell(self._branches.told(way).to(stage.dtype), grid) for way in Way}
        self._histories = tuple(History() for _ in batch)
        self._ways: list[Way] = []

    def begin_step(self, final: bool) -> None:
        """The evaluations that come are of another solver step."""
        for history in self._histories:
            history.final = final

    def __call__(self, x: Tensor, point: Point) -> Estimate:
        stage, branches, run = self._stage, self._branches, self._run
        way = stage.savings.when(len(self._ways), point)
        fed = branches.spread(x * point.c_in, way).to(stage.dtype)
        tau_B = torch.full((len(fed),), point.tau, dtype=torch.float32, device=fed.device)
        owners = self._histories * (len(fed) // len(self._batch)) if stage.savings.gated else ()
        with run.clock.network("denoiser"):
            output = run.evaluate(stage.network, fed, tau_B, self._told[way](fed, point.tau), owners)
        if stage.savings.gated and not any(history.computed[-1] for history in self._histories):
            run.clock.discount("denoiser", 1)
        self._ways.append(way)
        return stage.noise_scheduler.prediction.estimate(branches.combine(output.float(), way), x, point)

    def skips(self) -> list[CacheSkips]:
        """Of every picture, once it is drawn."""
        found, asked = [], self._branches.rows(Way.both)
        for sample, history in zip(self._batch, self._histories, strict=True):
            computed = history.computed if self._stage.savings.gated else [True] * len(self._ways)
            skipped = [k for k, done in enumerate(computed) if not done]
            rows = sum(self._branches.rows(way) for way, done in zip(self._ways, computed, strict=True) if done)
            found.append(CacheSkips(sample.ask.index, len(computed), skipped, asked * len(computed), rows))
        return found


def _noise(batch: list[Sample], like: Tensor) -> Noise:
    shape = tuple(like.shape[1:])

    def noise(step: int) -> Tensor:
        return torch.stack([step_noise(sample.ask.seed, step, shape) for sample in batch]).to(like.device)

    return noise
