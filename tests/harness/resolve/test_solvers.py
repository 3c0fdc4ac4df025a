"""Solvers that a request may name: those, and with those settings, that the command line would compose."""

import numpy as np
import pytest

from harness.client.generator import DiffusionGenerator
from harness.messages import GenerationRequest, Progress, array
from harness.resolve.compose import compose_run
from harness.resolve.names import ConfigError
from harness.resolve.request import to_message
from harness.resolve.solvers import other_solvers, run_with_solver
from schedulers.tables import SOLVERS

BRIEF = ["heun", "dpmpp_2m", "lcm", "pndm"]
FAMILIES = ["rectified_flow", "ddpm", "sgm"]


def composed(family: str, solver: str) -> object:
    """Return the settings of a composed run, or its refusal."""
    try:
        return compose_run(["task=serve", f"scheduler={family}", f"scheduler/solver={solver}"]).noise_scheduler
    except ConfigError as error:
        return str(error)


def check_solvers(family: str, names: list[str]) -> None:
    run = compose_run(["task=serve", f"scheduler={family}"])
    allowed = other_solvers(run)
    for name in names:
        expected = composed(family, name)
        if isinstance(expected, str):
            assert name not in allowed
            with pytest.raises(ValueError, match="solver") as refused:
                run_with_solver(run, name)
            assert "\n" not in str(refused.value)
        else:
            assert name in allowed
            assert run_with_solver(run, name).noise_scheduler == expected


def test_a_solver_is_the_one_that_the_command_line_composes() -> None:
    check_solvers("rectified_flow", BRIEF)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_solver_is_the_one_that_the_command_line_composes(family: str) -> None:
    check_solvers(family, list(SOLVERS.names()))


def test_what_has_one_solver_refuses_others_in_one_line() -> None:
    run = compose_run(["task=serve", "serve.max_batch=1", "engine=diffusers"])
    with pytest.raises(ValueError, match="solver=heun: engine=diffusers has the one of its configuration"):
        run_with_solver(run, "heun")
    assert run_with_solver(run, run.config.scheduler.solver.name) is run
    with pytest.raises(ValueError, match="did you mean 'heun'"):
        run_with_solver(compose_run(["task=serve"]), "huen")


def pixels(generator: DiffusionGenerator, **changes: object) -> tuple[np.ndarray, list[bytes]]:
    """Return the pixels of the only image, and the previews."""
    import msgspec

    shown: list[bytes] = []

    def on_progress(progress: Progress) -> None:
        if progress.preview:
            shown.append(progress.preview)

    message: GenerationRequest = msgspec.structs.replace(to_message(generator.config.request), **changes)
    result, frames = generator._engine.generate(message, on_progress)
    return array(result.samples[0].pixels, frames), shown


def test_a_request_with_a_solver_is_the_run_with_it_bit_for_bit() -> None:
    """On the built-in model, and previews change nothing."""
    common = ["launch.mode=inprocess", "launch.threads_per_rank=1", "request.prompt=rocket", "request.steps=4"]
    with DiffusionGenerator.from_config(*common) as generator:
        plain, none = pixels(generator)
        heun, shown = pixels(generator, solver="heun", previews=2)
        again, _ = pixels(generator, previews=3)
    with DiffusionGenerator.from_config(*common, "scheduler/solver=heun") as generator:
        expected, _ = pixels(generator)
    assert np.array_equal(heun, expected)
    assert np.array_equal(again, plain)
    assert not np.array_equal(heun, plain)
    assert (len(none), len(shown)) == (0, 2)
