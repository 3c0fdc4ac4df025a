"""task.fidelity: what a run is held to, and the meaning of its errors.

harness.metrics.fidelity defines the reference, the floor and the checks. References are made and kept by
harness.tasks.common.references, and harness.tasks.common.methods has what each feature claims.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from harness.config.optimize import Optimize
from harness.config.schema import RunConfig
from harness.messages import EngineInfo, OperatorError
from harness.metrics.difference import Difference, difference
from harness.metrics.fidelity import (
    APPROXIMATE,
    EQUIVALENT,
    EXACT,
    ROUNDING,
    Check,
    Fidelity,
    check,
    rounding_bound,
    verdict,
)
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY
from harness.resolve.compose import ResolvedRun, to_dict
from harness.resolve.published_scheduler import scheduler_file
from harness.resolve.request import to_message
from harness.serving.faults import failure_line
from harness.tasks.common.methods import METHODS, Method, float32_method, is_float32, method_class
from harness.tasks.common.references import (
    GeneratedOutput,
    ReferenceRenderer,
    References,
    floor_config,
    peer_config,
    reference_config,
    set_float32,
    without_prompts,
)
from models.files import read_json

WARM_REQUESTS = 4  # the last one finds caches filled, buffers used and CUDA graphs recorded, as a repeat does
if TYPE_CHECKING:
    from schedulers.published.peer import SchedulerDifference

REFERENCE, PEER = "the float32 reference", "engine=diffusers in float32"


class MeasuredOutputs:
    """The outputs of a run's repeats, each different one once, and the engine that made them.

    Args:
        info: State of the engine.

    Attributes:
        outputs: Outputs that differ in some bit, in the order in which they appeared.
        repeats: Numbers of the repeats that made each of them, from 1.
        info: State of the engine.
        operators: Operators that its ranks have compared with float64.
    """

    def __init__(self, info: EngineInfo) -> None:
        self.outputs: list[GeneratedOutput] = []
        self.repeats: list[list[int]] = []
        self.info = info
        self.operators: list[OperatorError] = []

    def add(self, output: GeneratedOutput) -> None:
        """Add the output of the next repeat."""
        number = sum(map(len, self.repeats)) + 1
        for known, numbers in zip(self.outputs, self.repeats, strict=True):
            if known.same_bits(output):
                numbers.append(number)
                return
        self.outputs.append(output)
        self.repeats.append([number])


class Errors(NamedTuple):
    """The relative L2 errors of an output."""

    latent: float
    pixel: float


@dataclass(frozen=True)
class Subject:
    """A run and what it is held to.

    Attributes:
        run: The resolved run.
        measured: What it generated.
        references: Kept outputs.
        reference: Output of the reference.
        errors: Errors of the run, of the repeat with the largest ones.
        floor: Errors of the floor.
        methods: All known methods.
        notes: Remarks for the record, to which checks add.
        not_held: Names of checks that could not be made, to which checks add.
    """

    run: ResolvedRun
    measured: MeasuredOutputs
    references: References
    reference: GeneratedOutput
    errors: Errors
    floor: Errors
    methods: Sequence[Method]
    notes: list[str]
    not_held: list[str]

    @property
    def claimed(self) -> str:
        """The class that the run claims."""
        return method_class(self.run.config, self.methods)[0]


def measure_fidelity(
    run: ResolvedRun,
    measured: MeasuredOutputs,
    renderer: ReferenceRenderer,
    methods: Sequence[Method] = METHODS,
) -> tuple[Fidelity | None, list[str]]:
    """Hold a run to its references.

    Args:
        run: The resolved run.
        measured: What the run generated.
        renderer: Generator of references that are not kept yet.
        methods: All known methods, with the class that each claims.

    Returns:
        The fidelity, or None if it could not be measured; and notes that say what is not held, and why.
    """
    start, config = time.perf_counter(), run.config
    exact = reference_config(config)
    try:
        references = References(run, renderer)
        reference = references.output(exact, "reference")
        floor = output_errors(reference, references.output(floor_config(config), "floor"))
        latent, pixel = differences(reference, measured.outputs)
    except Exception as error:  # whatever fails here, the measurement is kept
        skip = "task.fidelity=false skips it"
        return None, [f"fidelity is not measured because its reference failed: {failure_line(error)}; {skip}"]
    errors = Errors(latent.rel_l2, pixel.rel_l2)
    subject = Subject(run, measured, references, reference, errors, floor, methods, references.notes, [])
    checks = []
    for name, hold in CHECKS.items():
        try:
            checks += hold(subject)
        except Exception as error:  # the other checks still count
            subject.not_held.append(name)
            subject.notes.append(f"fidelity: {name} is not held: {failure_line(error)}")
    claimed, names = method_class(config, methods)
    return Fidelity(
        method_class=claimed,
        methods=names,
        latent=latent,
        pixel=pixel,
        floor_latent=floor.latent,
        floor_pixel=floor.pixel,
        verdict=verdict(claimed, latent, pixel, floor.latent, floor.pixel, checks),
        reference=references.key(exact),
        steps_rel_l2=rel_l2_by_step(reference, measured.outputs) if config.task.fidelity_per_step else None,
        checks=checks,
        not_held=subject.not_held,
        detectable=_detectable(subject, claimed, checks),
        generated=references.generated,
        duration_s=time.perf_counter() - start,
    ), subject.notes


def _detectable(subject: Subject, claimed: str, checks: Sequence[Check]) -> float | None:
    """Return the smallest error of the method that would have been called broken."""
    if claimed == EXACT:
        return 0.0
    bounds = {row.name: row.bound for row in checks}
    if "method" in subject.not_held:
        bounds.pop("method", None)
    return bounds.get("method", bounds.get("dtype"))


# ---------------------------------------------------------------- the checks


def hold_run(subject: Subject) -> list[Check]:
    """Hold an fp_equivalent run to its reference: in float32 this holds its method, otherwise its dtype."""
    if subject.claimed != EQUIVALENT:
        return []
    if is_float32(subject.run.config):
        return [_check_float32(subject, "method", subject.errors, REFERENCE)]
    return [_check("dtype", subject.errors, subject.floor, REFERENCE)]


def hold_repeats(subject: Subject) -> list[Check]:
    """Hold the repeats to one another: the same request on the same ranks.

    On a CPU every bit is repeated. A GPU may choose other kernels in a later repeat, which round anew.

    Args:
        subject: The run.

    Returns:
        The check, or none for a single repeat.
    """
    measured = subject.measured
    if sum(map(len, measured.repeats)) < 2:
        return []
    first, against = measured.outputs[0], f"repeat {measured.repeats[0][0]}"
    errors = Errors(*(row.rel_l2 for row in differences(first, measured.outputs)))
    if is_float32(subject.run.config):
        return [_check_float32(subject, "repeats", errors, against)]
    compiles = subject.run.config.engine.optimize is Optimize.compile  # which may happen again in a later repeat
    if measured.info.device.startswith("cpu") and not compiles:
        return [check("repeats", max(errors), 0.0, against)]
    return [_check("repeats", errors, subject.floor, against)]


def hold_method(subject: Subject) -> list[Check]:
    """Hold the run in float32 with its approximations made exact, unless the run or its reference is just that."""
    config, references = subject.run.config, subject.references
    exact, notes = float32_method(config, subject.measured.info.device, subject.methods)
    is_reference = references.key(exact) == references.key(reference_config(config))
    if is_reference or (is_float32(config) and subject.claimed != APPROXIMATE):
        return []
    subject.notes.extend(notes)
    subject.not_held.extend(["method"] * bool(notes))
    output = references.output(exact, "method in float32", WARM_REQUESTS)
    return [_check_float32(subject, "method", output_errors(subject.reference, output), REFERENCE)]


def hold_shared_arithmetic(subject: Subject) -> list[Check]:
    """Hold the arithmetic that run and reference share to diffusers, once for all prompts and seeds."""
    if not subject.run.config.task.fidelity_peer:
        return []
    peer, reference = peer_config(subject.run.config), subject.reference
    if peer.scheduler.family == PUBLISHED_FAMILY:
        _refuse_own_noise(subject.run)

    def measure() -> Check:
        first = GeneratedOutput([reference.latents[0][-1:]], reference.pixels[:1])
        errors = output_errors(first, subject.references.generate(peer, "peer"))
        return _check_float32(subject, "shared arithmetic", errors, PEER)

    found = subject.references.finding(["peer", without_prompts(peer)], measure)
    return [] if found is None else [found]


def _refuse_own_noise(run: ResolvedRun) -> None:
    """Refuse a peer whose solver adds noise between its steps, since diffusers' own class draws that itself."""
    from harness.baselines.noise_scheduler import adds_noise  # imports torch
    from schedulers.published import from_diffusers

    scheduler = from_diffusers(scheduler_file(run.checkpoint.folder))
    if adds_noise(scheduler, scheduler.grid(*_steps_and_tokens(run.config))):
        raise ValueError("diffusers draws the noise of each step itself, so its image is another one")


def hold_noise_scheduler(subject: Subject) -> list[Check]:
    """Hold the points and the solver to diffusers' own class, on numbers small enough to take no time."""
    run, config = subject.run, subject.run.config
    if not config.task.fidelity_peer:
        return []
    steps, tokens = _steps_and_tokens(config)

    def measure() -> Check | None:
        from schedulers.published.peer import difference_from_diffusers  # imports torch

        settings = run.noise_scheduler
        apart = (
            _published_difference(run, steps, tokens)
            if settings is None
            else difference_from_diffusers(settings, steps, tokens)
        )
        if apart is None:
            return None
        return check("noise scheduler", apart.rel_l2, ROUNDING, f"diffusers' {apart.class_name}")

    scheduler = to_dict(config)["scheduler"]
    found = subject.references.finding(["noise scheduler", scheduler, config.model.name, steps, tokens], measure)
    if found is None:
        raise ValueError("diffusers has no class of these settings")
    return [found]


def _published_difference(run: ResolvedRun, steps: int, tokens: int) -> SchedulerDifference:
    """Compare the checkpoint's own noise scheduler with the class of diffusers that its file names."""
    import torch

    from harness.baselines.build import native_components
    from harness.build.common import source_of
    from schedulers.published.peer import published_difference

    parts = native_components(run.config.model.architecture, source_of(run, torch.device("cpu")))
    content = read_json(scheduler_file(run.checkpoint.folder))
    return published_difference(content, steps, tokens, parts.even_sigmas)


def _steps_and_tokens(config: RunConfig) -> tuple[int, int]:
    """Return the solver steps of the request, and the tokens of its images, on which some shifts depend."""
    message, side = to_message(config.request), config.model.size_multiple
    return message.steps, (message.height // side) * (message.width // side)


def hold_operators(subject: Subject) -> list[Check]:
    """Hold code that exists in one dtype only to float64; the ranks have measured it."""
    operators = subject.measured.operators
    rows = [check("operators", row.rel_l2, row.bound, f"{row.operator} in float64") for row in operators]
    return sorted(rows, key=lambda row: row.error / row.bound)[-1:]


CHECKS: Mapping[str, Callable[[Subject], list[Check]]] = {
    "run": hold_run,
    "repeats": hold_repeats,
    "method": hold_method,
    "operators": hold_operators,
    "shared arithmetic": hold_shared_arithmetic,
    "noise scheduler": hold_noise_scheduler,
}
"""The checks, by what they hold."""


def _check(name: str, errors: Errors, floor: Errors, against: str) -> Check:
    """Return the check of the latent or the pixel, whichever is nearer to its bound or further beyond."""
    rows = [check(name, error, rounding_bound(least), against) for error, least in zip(errors, floor, strict=True)]
    return max(rows, key=lambda row: row.error / row.bound)


def _check_float32(subject: Subject, name: str, errors: Errors, against: str) -> Check:
    """Return the check of the errors between two float32 outputs.

    Rounding makes less than 1e-5 of nearly every request. Only for a larger error another output is generated, which
    tells how much of it rounding can make.
    """
    if max(errors) <= ROUNDING:
        return Check(name, max(errors), ROUNDING, against)
    config = floor_config(subject.run.config)
    set_float32(config)
    if not subject.measured.info.device.startswith("cpu"):  # where only another kernel adds in another order
        config.attention.backend = "sdpa"
    floor = output_errors(subject.reference, subject.references.output(config, "floor in float32"))
    return _check(name, errors, floor, against)


# ---------------------------------------------------------------- errors of outputs


def differences(reference: GeneratedOutput, outputs: Sequence[GeneratedOutput]) -> tuple[Difference, Difference]:
    """Return the largest difference of several outputs at the final latent, and the largest one at the pixels."""
    latents = [difference(reference.final_latents, output.final_latents) for output in outputs]
    pixels = [difference(reference.pixels, output.pixels, pixels=True) for output in outputs]
    return max(latents, key=_size), max(pixels, key=_size)


def output_errors(reference: GeneratedOutput, output: GeneratedOutput) -> Errors:
    """Return the errors of one output."""
    return Errors(
        difference(reference.final_latents, output.final_latents).rel_l2,
        difference(reference.pixels, output.pixels).rel_l2,
    )


def rel_l2_by_step(reference: GeneratedOutput, outputs: Sequence[GeneratedOutput]) -> list[float]:
    """Return the relative L2 error of the state after every solver step, over all images of the worst output."""
    output = max(outputs, key=lambda one: sum(output_errors(reference, one)))
    steps = range(len(reference.latents[0]))
    return [difference([x[i] for x in reference.latents], [x[i] for x in output.latents]).rel_l2 for i in steps]


def _size(row: Difference) -> float:
    return row.rel_l2 if row.rel_l2 == row.rel_l2 else float("inf")  # NaN is the largest error
