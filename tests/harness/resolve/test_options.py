"""Every key is declared with a meaning, its words and its range, and one check refuses what does not fit."""

import copy
import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import pytest

from harness.resolve.compose import ConfigError, compose_run
from harness.resolve.options import check_options
from schedulers.options import Option, option_of
from schedulers.settings import NoiseSchedulerSettings
from tests.fixtures.options import ANNOTATIONS, KEYS, full, is_number, put


def wrong(declared: Option, numeric: bool) -> Iterator[Any]:
    """Yield values that an option does not have."""
    if declared.words:
        yield 77 if isinstance(declared.words[0], int) else "nonsense"
    if numeric and not declared.words:
        yield math.nan
        if not declared.infinite:
            yield math.inf
        yield from [] if declared.low is None else [declared.low - 1]
        yield from [] if declared.high is None else [declared.high + 1]
        yield from [] if declared.above is None else [declared.above]
        yield from [] if declared.below is None else [declared.below]
        yield -math.inf


def test_every_key_is_checked_and_has_a_meaning() -> None:
    assert [key for key, _ in KEYS] == list(ANNOTATIONS)
    assert len(KEYS) > 330
    for key, declared in KEYS:
        assert declared.meaning.endswith("."), key
        assert declared.meaning[:2] != declared.meaning[:2].lower() or declared.meaning.startswith(
            ("sigma", "8-bit")
        ), key


def test_every_group_and_setting_is_declared() -> None:
    nodes: list[Any] = [full()]
    while nodes:
        for field in fields(node := nodes.pop()):
            assert option_of(field).meaning, field.name
            nodes += [value for value in [getattr(node, field.name)] if is_dataclass(value)]
    assert all(option_of(field).meaning for field in fields(NoiseSchedulerSettings))


def test_the_defaults_fit() -> None:
    check_options(full())


@pytest.mark.parametrize(("key", "declared"), KEYS, ids=[key for key, _ in KEYS])
def test_a_wrong_value_is_refused_in_one_line_that_names_the_key(key: str, declared: Option) -> None:
    for value in wrong(declared, is_number(key)):
        config = full()
        put(config, key, value)
        with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
            check_options(config)
        assert str(caught.value).startswith(f"{key}="), value


@pytest.mark.parametrize(("key", "declared"), KEYS, ids=[key for key, _ in KEYS])
def test_values_at_the_edges_and_every_word_are_accepted(key: str, declared: Option) -> None:
    edges = [edge for edge in (declared.low, declared.high) if edge is not None]
    for value in (*declared.words, *edges, None):
        config = full()
        put(config, key, value)
        check_options(config)


def test_an_enum_has_its_own_words() -> None:
    for key, declared in KEYS:
        value: Any = copy.copy(full())
        for part in key.replace("[0]", ".0").split("."):
            value = (
                value[part] if isinstance(value, dict) else value[int(part)] if part.isdigit() else getattr(value, part)
            )
        if isinstance(value, Enum):
            assert declared.words == tuple(type(value).__members__), key


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("scheduler.end=cleen", "scheduler.end=cleen is not one of clean, t_min; did you mean clean?"),
        ("scheduler.beta_end=nan", "scheduler.beta_end=nan; give a finite number, more than 0 and less than 1"),
        ("scheduler.mu=inf", "scheduler.mu=inf; give a finite number, -7 to 7"),
        ("scheduler.sigmas=[1.0,0.0]", "scheduler.sigmas=0.0; give 1e-06 to 1e+06"),
        ("scheduler.edm_sign=2", "scheduler.edm_sign=2 is not one of 1, -1"),
        ("scheduler.solver.name=eular", "scheduler.solver.name=eular is not one of euler, ddim"),
        ("model.checkpoint_defaults.ddpm.end=tmin", "model.checkpoint_defaults.ddpm.end=tmin is not one of clean"),
        ("hardware.link_gb_s=0", "hardware.link_gb_s=0.0; give more than 0 GB/s"),
        (
            "train.parts=[data,vea]",
            "train.parts=vea is not one of data, vae, text, denoiser, export, score; did you mean vae?",
        ),
        ("parallel.cfg=3", "parallel.cfg=3; give 1 or 2"),
    ],
)
def test_composing_refuses_it_before_anything_else(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_run([override])
    assert str(caught.value).startswith(line)
