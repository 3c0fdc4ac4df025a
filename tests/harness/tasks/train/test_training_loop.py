"""The training loop: resumed runs equal uninterrupted ones, averages follow their formula, batches cover the data."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from harness.config.train import LoopConfig
from harness.loggers.training import LossCurvePoint, TrainingCallback
from harness.tasks.train.loop import (
    Ema,
    PeriodicCallback,
    Trainer,
    batch_indices,
    learning_rate,
    load_ema,
    read_checkpoint,
    step_generator,
    total_steps,
)

CONFIG = LoopConfig(images=160, batch=4, lr=0.05, warmup=5, decay=0.25, ema=0.9, log_every=10, save_every_s=1e9)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_on(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(CONFIG.batch, 3, generator=step_generator(CONFIG.seed, step))
    return (model(x).squeeze(1) - x.sum(dim=1)).square().mean()


def fit(folder: Path, stops: tuple[int | None, ...]) -> Trainer:
    for stop in stops:
        model = tiny()
        last = Trainer("tiny", model, CONFIG, folder)
        last.run(lambda step, model=model: loss_on(model, step), until=stop)  # type: ignore[misc]
    return last


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", (None,))
    parts = fit(tmp_path / "parts", (7, 23, None))
    assert whole.step == parts.step == total_steps(CONFIG)
    expected, found = (read_checkpoint(run.checkpoint)[0] for run in (whole, parts))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_training_lowers_the_loss_and_writes_the_curve(tmp_path: Path) -> None:
    seen: list[int] = []
    model = tiny()
    before = loss_on(model, 10_000).item()

    class Watch(TrainingCallback):
        def line(self, line: LossCurvePoint) -> None:
            seen.append(line.step)

    run = Trainer("tiny", model, CONFIG, tmp_path, Watch())
    run.run(lambda step: loss_on(model, step))
    assert loss_on(model, 10_000).item() < 0.2 * before
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == seen == [10, 20, 30, 40]
    assert lines[-1]["images"] == 160


def test_lines_after_the_checkpoint_are_dropped_when_a_killed_run_goes_on(tmp_path: Path) -> None:
    whole, killed = fit(tmp_path / "whole", (None,)), fit(tmp_path / "killed", (20,))
    with killed.curve.open("a") as curve:
        lines = whole.curve.read_text().splitlines()
        curve.write("".join(f"{line}\n" for line in [lines[2], '{"part": "other", "step": 99}']) + '{"part": "ti')
    fit(tmp_path / "killed", (None,))
    rows = [json.loads(line) for line in killed.curve.read_text().splitlines()]
    assert [(row["part"], row["step"]) for row in rows] == [
        ("tiny", 10),
        ("tiny", 20),
        ("other", 99),
        ("tiny", 30),
        ("tiny", 40),
    ]


def test_every_is_called_before_the_checkpoint_of_its_step(tmp_path: Path) -> None:
    model = tiny()

    def wipe(run: Trainer) -> None:
        with torch.no_grad():
            run.ema.shadow["0.bias"].fill_(7.0)

    Trainer("tiny", model, CONFIG, tmp_path).run(
        lambda step: loss_on(model, step), until=20, every=PeriodicCallback(20, wipe)
    )
    assert torch.equal(load_ema(tmp_path / "tiny.safetensors")["0.bias"], torch.full((8,), 7.0))


def test_average_follows_its_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema, expected = Ema(model, 0.5), 0.0
    for step in range(1, 12):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert float(ema.shadow["weight"]) == pytest.approx(expected, rel=1e-6)


def test_learning_rate_rises_holds_and_falls_to_zero() -> None:
    config = LoopConfig(images=1000, batch=1, lr=2.0, warmup=10, decay=0.3)
    rates = [learning_rate(step, config) for step in range(1001)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[700] == 2.0
    assert rates[850] == pytest.approx(1.0)
    assert rates[1000] == 0.0


def test_every_epoch_holds_each_row_once() -> None:
    rows = torch.cat([batch_indices(10, 4, seed=3, step=step) for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()
    assert len(batch_indices(3, 8, seed=0, step=1)) == 8
