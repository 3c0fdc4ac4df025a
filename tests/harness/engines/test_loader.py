"""Ranks that change to another run generate, bit for bit, what fresh ranks generate."""

import shutil
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from harness.build import worker as building
from harness.build.native import LoadedNetworks
from harness.config.yaml import ConfigError, to_yaml
from harness.engines.inprocess import NoCancelFlags
from harness.messages import Configure, EngineInfo, Failure, decode
from harness.parallel.collectives import LocalCollectives
from harness.serving.request_scheduler import RequestScheduler
from tests.fixtures.parallel.changed_runs import changed_and_fresh, composed, digest, generated, new_loader
from tests.fixtures.parallel.ranks import on_worlds

RUNS = {
    "euler": "",
    "other steps and no guidance": "request.steps=2 request.guidance=1",
    "two evaluations a step": "scheduler/solver=heun",
    "two steps back": "scheduler/solver=dpmpp_2m",
    "noise of its own": "scheduler/solver=ancestral",
    "forecast": "cache=taylorseer cache.warmup=1 cache.interval=2",
    "first block": "cache=first_block cache.threshold=9",
    "guidance cache": "cache=guidance_skip",
}
"""Runs that share their weights, by what is special about each."""
OTHER_WEIGHTS = {
    "flow": "engine.optimize=none",
    "ddpm": "engine.optimize=none scheduler=ddpm",
    "diffusers": "engine=diffusers engine.optimize=none",
    "two bytes": "engine.optimize=none model.dtype=bfloat16",
    "sgm": "engine.optimize=none scheduler=sgm",
    "flow again": "engine.optimize=none",
}
LAYOUTS = ("parallel=dp2", "parallel=ulysses2", "parallel=cfg2")


@cache
def fresh_digest(overrides: str) -> str:
    """Return the hash of the images that a rank generates which has run nothing else."""
    run = composed(*overrides.split())
    return digest(generated(new_loader(run), run))


def every_pair(names: Sequence[str]) -> list[str]:
    """Return an order in which each name follows each other one."""
    order = []
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            order += [first, second]
        order.append(first)
    return order


@pytest.mark.parametrize(
    "order",
    [
        pytest.param([*RUNS, "euler"], id="in turn"),
        pytest.param(every_pair([*RUNS]), id="every pair", marks=pytest.mark.slow),
    ],
)
def test_a_run_after_another_one_generates_what_fresh_ranks_do_without_loading_again(
    order: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load_networks = building.load_networks
    wanted = {name: fresh_digest(overrides) for name, overrides in RUNS.items()}
    assert len({*wanted.values()}) == len(RUNS)  # so that a run which did not change would be seen
    monkeypatch.setattr(building, "load_networks", lambda *args: loads.append(1) or load_networks(*args))
    loader = new_loader(composed())
    for name in order:
        assert digest(generated(loader, composed(*RUNS[name].split()))) == wanted[name], name
    assert loads == [1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_generate_what_fresh_ones_do_after_other_sizes() -> None:
    compiled = ("engine.optimize=compile", "request.prompts=[rocket]")
    runs = {name: composed(*RUNS[name].split(), *compiled) for name in [*list(RUNS)[:3], "forecast"]}
    wanted = {}
    for name, run in runs.items():
        torch._dynamo.reset()
        wanted[name] = digest(generated(new_loader(run), run))
    torch._dynamo.reset()
    loader = new_loader(runs["euler"])
    for name in every_pair([*runs]):
        assert digest(generated(loader, runs[name])) == wanted[name], name


def test_other_weights_take_the_place_of_the_last_ones_which_are_freed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {name: fresh_digest(overrides) for name, overrides in OTHER_WEIGHTS.items()}
    assert len({*wanted.values()}) >= 4  # diffusers may round as this project does
    networks: list[weakref.ref[nn.Module]] = []
    load_networks = building.load_networks

    def load(*args: Any) -> LoadedNetworks:
        assert [network for network in networks if network() is not None] == []
        loaded = load_networks(*args)
        networks.append(weakref.ref(loaded.components.network))
        return loaded

    monkeypatch.setattr(building, "load_networks", load)
    loader = new_loader(composed())
    for name, overrides in OTHER_WEIGHTS.items():
        assert digest(generated(loader, composed(*overrides.split()))) == wanted[name], name
    assert len(networks) == len(OTHER_WEIGHTS) - 1  # diffusers has its own


def test_the_engine_says_what_it_runs_now() -> None:
    run = composed("engine.optimize=none", "attention=sdpa")
    loader = new_loader(run)
    infos = [loader.load(each) for each in (run, composed("engine.optimize=none", "attention=math"))]
    assert [info.attention for info in infos] == ["torch sdpa", "math"]
    assert [part.component for part in infos[1].loaded] == [part.component for part in infos[0].loaded]


@pytest.mark.parametrize("text", ["", "[", "task: {name: nothing}", "a: b"])
def test_a_text_that_is_no_configuration_is_refused_and_changes_nothing(text: str) -> None:
    run = composed("engine.optimize=none")
    loader = new_loader(run)
    before = generated(loader, run)
    scheduler = RequestScheduler(loader.worker, LocalCollectives(), NoCancelFlags(), loader)
    changes: list[EngineInfo] = []
    answer = decode(scheduler.configure(Configure(text), changes.append))
    assert isinstance(answer, Failure)
    assert answer.kind == "rejected"
    assert changes == []
    assert digest(before) == digest(generated(loader, run))


def test_another_layout_needs_other_ranks() -> None:
    with pytest.raises(ConfigError, match="a layout of 2 ranks needs ranks of its own"):
        new_loader(composed()).read(to_yaml(composed("parallel=dp2").config))


def test_ranks_of_a_layout_change_together() -> None:
    runs = [RUNS["euler"], RUNS["forecast"], RUNS["two evaluations a step"], RUNS["euler"]]
    worlds = on_worlds(2, changed_and_fresh, [([layout], runs) for layout in LAYOUTS])
    for rank in worlds:
        compared = [name for name in rank if " changed " in name]
        assert compared or rank["parallel=ulysses2 rank"] == 1
        for name in compared:
            assert torch.equal(rank[name], rank[name.replace("changed", "fresh")]), name
