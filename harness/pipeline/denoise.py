"""Denoising: the solver pulls network evaluations, micro-batch by micro-batch, down the grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.parallel.group import Group
from harness.parallel.stale import Stale
from harness.pipeline.guidance import Branches
from harness.pipeline.latents import step_noise
from harness.pipeline.state import RunContext, Sample, micro_batches, written
from models.components import CLASSIFIER_FREE, GuidanceRule
from schedulers.grid import Point
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import Estimate
from schedulers.solvers.base import Denoise, Memory, Noise


class Denoising:
    """Stage 5.

    Args:
        network: (latent, tau, conditioning) to the raw output.
        dtype: the network's; the state between steps is float32.
        noise_scheduler: solver and prediction.
        rule: how the checkpoint is guided.
        cfg: the ranks of the guidance branches; None for this rank alone.
        stale: what the layout keeps between the evaluations of a micro-batch; None where those are independent.
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
        stale: Stale | None = None,
    ) -> None:
        self.network = network
        self.dtype = dtype
        self.noise_scheduler = noise_scheduler
        self.rule = rule
        self.cfg = cfg
        self.stale = stale

    def forward(self, samples: list[Sample], run: RunContext) -> None:
        batches = micro_batches(samples, run.batch_size)
        total = sum(written(batch[0].grid).steps for batch in batches)
        for batch in batches:
            if self.stale is not None:
                self.stale.begin()
            self._denoise(batch, run, total)
            if self.stale is not None:
                run.notes.append(self.stale.end())

    def _denoise(self, batch: list[Sample], run: RunContext, total: int) -> None:
        grid = written(batch[0].grid)
        x = torch.stack([written(sample.start) for sample in batch])
        denoise, memory, noise = self._network_call(batch, run), Memory(), _noise(batch, x)
        for i in range(grid.steps):
            run.check_cancelled()
            with run.clock.step():
                x = self.noise_scheduler.step(x, i, grid, denoise, memory, noise)
            if run.keep_states:
                for sample, state in zip(batch, x, strict=True):
                    sample.states.append(state)
            run.on_progress(self.name, len(run.clock.steps), total)
        for sample, latent in zip(batch, x, strict=True):
            sample.latent = latent

    def _network_call(self, batch: list[Sample], run: RunContext) -> Denoise:
        """The network as a solver sees it: (x, point) to an Estimate, guidance applied to the raw output."""
        branches = Branches(batch, self.rule, self.cfg)
        condition = branches.condition.to(self.dtype)

        def denoise(x: Tensor, point: Point) -> Estimate:
            fed = branches.spread(x * point.c_in).to(self.dtype)
            tau_B = torch.full((len(fed),), point.tau, dtype=torch.float32, device=fed.device)
            with run.clock.network("denoiser"):
                output = run.evaluate(self.network, fed, tau_B, condition)
            return self.noise_scheduler.prediction.estimate(branches.combine(output.float()), x, point)

        return denoise


def _noise(batch: list[Sample], like: Tensor) -> Noise:
    shape = tuple(like.shape[1:])

    def noise(step: int) -> Tensor:
        return torch.stack([step_noise(sample.ask.seed, step, shape) for sample in batch]).to(like.device)

    return noise
