"""What each rank of a layout draws with a whole pipeline."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.build.worker import build_worker
from harness.config.schema import RunConfig
from harness.messages import GenerationRequest, RankOutcome, array, decode
from harness.parallel.mesh import AXES, RankPosition, degrees

Degrees = tuple[int, ...]


@dataclass(frozen=True)
class Drawing:
    """One request of one checkpoint under one layout.

    Args:
        name: of the checkpoint.
        config: of one rank; the degrees of its layout are `degrees`.
        request: what is drawn.
        degrees: of dp, cfg, tp, ring and ulysses.
    """

    name: str
    config: RunConfig
    request: GenerationRequest
    degrees: Degrees

    def __str__(self) -> str:
        """The checkpoint and the layout."""
        return f"{self.name} {'x'.join(map(str, self.degrees))}"


def draw(rank: int, size: int, drawing: Drawing) -> dict[str, Tensor]:
    """Latents and pixels of the pictures that this rank answers for, by name and number; loads the checkpoint."""
    return _pictures(drawing, *_answer(rank, drawing))


def draw_counted(rank: int, size: int, drawing: Drawing) -> dict[str, Tensor]:
    """The same, and the bytes that this rank sent to decode them, by kind of collective."""
    outcome, frames = _answer(rank, drawing)
    assert outcome.report is not None
    sent = {kind: torch.tensor(traffic.bytes) for kind, traffic in outcome.report.comm["decoding"].items()}
    return _pictures(drawing, outcome, frames) | sent


def draw_stale(rank: int, size: int, drawing: Drawing) -> dict[str, Tensor]:
    """Pictures, the bytes that this rank sent to denoise them, by kind, and the evaluations that its notes call exact,
    of all of them, with the MiB that it kept.
    """
    outcome, frames = _answer(rank, drawing)
    assert outcome.report is not None
    sent = {kind: torch.tensor(traffic.bytes) for kind, traffic in outcome.report.comm["denoising"].items()}
    (note,) = set(outcome.report.notes)
    told = [float(number) for number in re.findall(r"[0-9]+(?:\.[0-9]+)?", note)]
    return _pictures(drawing, outcome, frames) | sent | {"told": torch.tensor(told, dtype=torch.float64)}


def draw_peak(rank: int, size: int, drawing: Drawing) -> dict[str, Tensor]:
    """The peak of this rank's memory while it drew, MiB, as records have it."""
    outcome, _ = _answer(rank, drawing)
    assert outcome.report is not None
    return {"peak_mib": torch.tensor(outcome.report.peak_memory_mib)}


def _answer(rank: int, drawing: Drawing) -> tuple[RankOutcome, Sequence[bytes]]:
    layout = replace(drawing.config.parallel, **dict(zip(AXES, drawing.degrees, strict=True)))
    config = replace(drawing.config, parallel=layout)
    worker = build_worker(config, RankPosition(rank, degrees(layout)), torch.device("cpu"))
    frames = worker.generate(drawing.request, lambda stage, done, total: None, lambda: False)
    outcome = decode(frames)
    assert isinstance(outcome, RankOutcome)
    assert outcome.failure is None, (str(drawing), outcome.failure)
    return outcome, frames


def _pictures(drawing: Drawing, outcome: RankOutcome, frames: Sequence[bytes]) -> dict[str, Tensor]:
    found = {}
    for sample in outcome.samples:
        assert sample.latents is not None
        for kind, ref in (("latent", sample.latents), ("pixels", sample.pixels)):
            found[f"{drawing} {kind} {sample.index}"] = torch.from_numpy(array(ref, frames).copy())
    return found
