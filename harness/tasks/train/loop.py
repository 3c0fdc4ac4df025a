"""The one training loop: AdamW, warm-up and linear decay, averaged weights, exact resumption.

A step's batch and noise come from a generator seeded by (seed, step) alone, so a resumed run equals an uninterrupted
one. State is written as safetensors with a JSON header entry, never pickled, and replaced atomically.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.config.train import LoopConfig
from harness.loggers.training import LossCurvePoint, TrainingCallback
from harness.records.record import write_atomically

log = logging.getLogger(__name__)


class Ema:
    """Averaged weights: shadow <- d shadow + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)) at update n.

    Args:
        model: Model whose weights are averaged.
        decay: Upper limit of the decay d.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the shadow towards the weights after update number ``step`` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = model.state_dict()
        torch._foreach_lerp_(list(self.shadow.values()), [weights[name] for name in self.shadow], 1.0 - decay)


def learning_rate(step: int, config: LoopConfig) -> float:
    """Return the learning rate of update ``step`` (from 0).

    It rises linearly in the warm-up, stays constant, and falls linearly to zero over the last share ``decay`` of all
    updates.

    Args:
        step: Number of the update, from 0.
        config: Rates and lengths.

    Returns:
        The learning rate.
    """
    steps = total_steps(config)
    rise = (step + 1) / config.warmup if step < config.warmup else 1.0
    fall = (steps - step) / (config.decay * steps) if config.decay else 1.0
    return config.lr * min(rise, fall, 1.0)


def total_steps(config: LoopConfig) -> int:
    """Return the number of updates of the whole run."""
    return max(1, config.images // config.batch)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the random stream of one step, independent of earlier steps."""
    return torch.Generator().manual_seed((seed << 32) + step)


def batch_indices(count: int, batch: int, seed: int, step: int) -> Tensor:
    """Return the rows of a batch, int64 (batch,): slices of a fresh permutation of all rows in each epoch.

    Args:
        count: Number of rows.
        batch: Rows per batch.
        seed: Seed of the permutations.
        step: Number of the batch, from 0.

    Returns:
        Indices of the rows.
    """
    first, last = step * batch, (step + 1) * batch
    epochs = range(first // count, (last - 1) // count + 1)
    order = torch.cat([torch.randperm(count, generator=step_generator(seed + 1, epoch)) for epoch in epochs])
    start = first - epochs[0] * count
    return order[start : start + batch]


def configure_cpu(config: LoopConfig) -> None:
    """Set the threads, and flush denormals to zero: flat art produces many of them, and they are slow."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)


class Trainer:
    """A model, its optimiser and its averaged weights, advanced step by step by ``run``.

    Args:
        part: Name of the trained part, for the curve and the checkpoint.
        model: Model, trained in place.
        config: Rates, lengths and seeds.
        folder: Folder of ``<part>.safetensors`` and ``curve.jsonl``; a checkpoint found there is resumed.
        callback: Callback for the progress.
        objective: Description of the loss, stored in the checkpoint.

    Raises:
        ValueError: The checkpoint found was trained with another objective.
    """

    def __init__(
        self,
        part: str,
        model: nn.Module,
        config: LoopConfig,
        folder: Path,
        callback: TrainingCallback | None = None,
        objective: str = "",
    ) -> None:
        self.part, self.model, self.config, self.folder, self.objective = part, model, config, folder, objective
        self.callback = TrainingCallback() if callback is None else callback
        decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
        plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        betas = (config.beta1, config.beta2)
        self.optimiser = torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
        self.ema = Ema(model, config.ema)
        self.step = 0
        self.elapsed_s = 0.0
        self.done: set[str] = set()  # one-time changes already made to the weights, stored in the checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self.load()

    @property
    def checkpoint(self) -> Path:
        """The checkpoint file."""
        return self.folder / f"{self.part}.safetensors"

    @property
    def curve(self) -> Path:
        """The file of the loss curve, shared by all parts trained in the folder."""
        return self.folder / "curve.jsonl"

    def run(
        self, loss_of: Callable[[int], Tensor], until: int | None = None, every: "PeriodicCallback | None" = None
    ) -> None:
        """Train up to a step.

        Args:
            loss_of: Function that returns the loss of a step's batch.
            until: Step at which to stop; None means the end.
            every: Callback to run at intervals.
        """
        configure_cpu(self.config)
        started, saved = time.monotonic() - self.elapsed_s, time.monotonic()
        mark, losses = (time.monotonic(), self.step), []
        steps = total_steps(self.config)
        until = steps if until is None else until
        self.callback.begin(self.part, self.step, steps)
        while self.step < until:
            losses.append(self.update(loss_of(self.step)))
            self.callback.step(self.part, self.step)
            now = time.monotonic()
            self.elapsed_s = now - started
            if self.step % self.config.log_every == 0 or self.step == until:
                rate = (self.step - mark[1]) * self.config.batch / max(now - mark[0], 1e-9)
                self.report(float(torch.stack(losses).mean()), rate)
                mark, losses = (now, self.step), []
            if every is not None and self.step % every.steps == 0:
                every.call(self)
            if now - saved > self.config.save_every_s:
                self.save()
                saved = time.monotonic()
        self.save()

    def update(self, loss: Tensor) -> Tensor:
        """Do one optimiser step on ``loss``, and return the detached loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip, foreach=True)
        self.optimiser.step()
        self.step += 1
        self.ema.update(self.model, self.step)
        return loss.detach()

    def report(self, loss: float, images_per_s: float) -> None:
        """Append one line to the loss curve and pass it to the callback."""
        images = self.step * self.config.batch
        rate = learning_rate(self.step, self.config)
        line = LossCurvePoint(self.part, self.step, images, loss, rate, images_per_s, self.elapsed_s)
        with self.curve.open("a", encoding="utf-8") as curve:
            curve.write(json.dumps(asdict(line)) + "\n")
        self.callback.line(line)

    def save(self) -> None:
        """Write weights, averaged weights, moments and position; the file replaces the last checkpoint in one move."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"ema/{name}": value for name, value in self.ema.shadow.items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{index}/{name}": value for name, value in state.items()}
        tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
        position = {"step": str(self.step), "elapsed_s": str(self.elapsed_s), "done": " ".join(sorted(self.done))}
        position["objective"] = self.objective
        partial = self.checkpoint.with_suffix(".partial")
        save_file(tensors, partial, metadata=position)
        os.replace(partial, self.checkpoint)

    def load(self) -> None:
        """Resume from the checkpoint file; lines of the curve that a killed run wrote after it are dropped.

        Raises:
            ValueError: The checkpoint was trained with another objective.
        """
        tensors, position = read_checkpoint(self.checkpoint)
        before = position.get("objective", self.objective)
        if before != self.objective:
            raise ValueError(
                f"{self.checkpoint} was trained with another objective ({before}); choose another train.folder, "
                f"or go back to it from: {self.objective}"
            )
        self.model.load_state_dict(_with_prefix(tensors, "model/"))
        for name, value in _with_prefix(tensors, "ema/").items():
            self.ema.shadow[name].copy_(value)
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in _with_prefix(tensors, "optimiser/").items():
            index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
        self.optimiser.load_state_dict({"state": state, "param_groups": self.optimiser.state_dict()["param_groups"]})
        self.step, self.elapsed_s = int(position["step"]), float(position["elapsed_s"])
        self.done = set(position.get("done", "").split())
        self._truncate_curve()
        log.info("%s resumed at step %d", self.part, self.step)

    def _truncate_curve(self) -> None:
        lines = self.curve.read_text(encoding="utf-8").splitlines() if self.curve.exists() else []
        remaining = [line for line in lines if not self._is_after_checkpoint(line)]
        if len(remaining) < len(lines):
            write_atomically(self.curve, "".join(f"{line}\n" for line in remaining).encode())

    def _is_after_checkpoint(self, line: str) -> bool:
        """Return whether a line of the curve is this part's and later than its checkpoint, or cut short by a kill."""
        try:
            row = json.loads(line)
        except ValueError:
            return True
        return bool(row["part"] == self.part and row["step"] > self.step)


@dataclass(frozen=True)
class PeriodicCallback:
    """A callback of the training loop, such as saving samples.

    Attributes:
        steps: Steps between two calls.
        call: Function to call with the trainer.
    """

    steps: int
    call: Callable[[Trainer], None]


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the position of a checkpoint written by ``Trainer.save``."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def load_ema(path: Path) -> dict[str, Tensor]:
    """Return the averaged weights of a checkpoint."""
    return _with_prefix(read_checkpoint(path)[0], "ema/")


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
