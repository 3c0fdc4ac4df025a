"""task.fidelity: what a run is held to, and the meaning of its errors.

harness.metrics.fidelity defines the reference, the floor and the checks. References are made and kept by
harness.tasks.common.references, and harness.tasks.common.methods has what each feature claims.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.engines.protocol import RequestFailed
from harness.messages import EngineInfo
from harness.metrics.difference import Difference, difference
from harness.metrics.fidelity import EQUIVALENT, ROUNDING, Check, Fidelity, rounding_bound, verdict
from harness.resolve.checkpoint_defaults import PUBLISHED_FAMILY
from harness.resolve.compose import ResolvedRun, to_dict
from harness.resolve.published_scheduler import scheduler_file
from harness.resolve.request import to_message
from harness.serving.transport import EngineGone
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

FAILURES = (RequestFailed, EngineGone, OSError, ValueError)
REFERENCE, PEER = "the float32 reference", "engine=diffusers in float32"


class MeasuredOutputs:
    """The outputs of a run's repeats, each different one once, and the state of the engine that made them.

    Args:
        info: State of the engine.

    Attributes:
        outputs: Outputs that differ in some bit, in the order in which they appeared.
        repeats: Numbers of the repeats that made each of them, from 1.
        info: State of the engine.
    """

    def __init__(self, info: EngineInfo) -> None:
        self.outputs: list[GeneratedOutput] = []
        self.repeats: list[list[int]] = []
        self.info = info

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
    """

    run: ResolvedRun
    measured: MeasuredOutputs
    references: References
    reference: GeneratedOutput
    errors: Errors
    floor: Errors
    methods: Sequence[Method]
    notes: list[str]

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
    start, config, references = time.perf_counter(), run.config, References(run, renderer)
    exact = reference_config(config)
    try:
        reference = references.output(exact, "reference")
        floor = output_errors(reference, references.output(floor_config(config), "floor"))
    except FAILURES as error:
        skip = "task.fidelity=false skips it"
        return None, [f"fidelity is not measured because its reference failed: {_line(error)}; {skip}"]
    latent, pixel = differences(reference, measured.outputs)
    errors = Errors(latent.rel_l2, pixel.rel_l2)
    subject = Subject(run, measured, references, reference, errors, floor, methods, [])
    checks = []
    for subject_of_check, hold in CHECKS.items():
        try:
            checks += hold(subject)
        except FAILURES as error:
            subject.notes.append(f"fidelity: {subject_of_check} not held: {_line(error)}")
    claimed, names = method_class(config, methods)
    bounds = {check.name: check.bound for check in checks}
    return Fidelity(
        method_class=claimed,
        methods=names,
        latent=latent,
        pixel=pixel,
        floor_latent=floor.latent,
        floor_pixel=floor.pixel,
        verdict=verdict(claimed, latent, pixel, floor.latent, floor.pixel, checks),
        reference=references.key(exact),
        steps_rel_l2=rel_l2_by_step(reference, measured.outputs[-1]) if config.task.fidelity_per_step else None,
        checks=checks,
        detectable=bounds.get("method", bounds.get("dtype")),
        generated=references.generated,
        duration_s=time.perf_counter() - start,
    ), subject.notes


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
    if measured.info.device.startswith("cpu"):
        return [Check("repeats", max(errors), 0.0, against)]
    return [_check("repeats", errors, subject.floor, against)]


def hold_method(subject: Subject) -> list[Check]:
    """Hold the run in float32 with its approximations made exact, unless the run or its reference is just that."""
    config, references = subject.run.config, subject.references
    exact, notes = float32_method(config, subject.measured.info.device, subject.methods)
    is_reference = references.key(exact) == references.key(reference_config(config))
    if is_reference or (is_float32(config) and subject.claimed == EQUIVALENT):
        return []
    subject.notes.extend(notes)
    output = references.output(exact, "method in float32")
    return [_check_float32(subject, "method", output_errors(subject.reference, output), REFERENCE)]


def hold_shared_arithmetic(subject: Subject) -> list[Check]:
    """Hold the arithmetic that run and reference share to diffusers, once for all prompts and seeds."""
    if not subject.run.config.task.fidelity_peer:
        return []
    peer, reference = peer_config(subject.run.config), subject.reference
    if peer.scheduler.family == PUBLISHED_FAMILY:
        _refuse_own_noise(subject.run)

    def measure() -> list[float]:
        first = GeneratedOutput([reference.latents[0][-1:]], reference.pixels[:1])
        return [*output_errors(first, subject.references.generate(peer, "peer"))]

    errors = Errors(*subject.references.finding(["peer", without_prompts(peer)], measure))
    return [_check_float32(subject, "shared arithmetic", errors, PEER)]


def _refuse_own_noise(run: ResolvedRun) -> None:
    """Refuse a peer whose solver adds noise between its steps, since diffusers' own class draws that itself."""
    from harness.baselines.noise_scheduler import adds_noise  # imports torch
    from schedulers.published import from_diffusers

    message, side = to_message(run.config.request), run.config.model.size_multiple
    scheduler = from_diffusers(scheduler_file(run.checkpoint.folder))
    if adds_noise(scheduler, scheduler.grid(message.steps, (message.height // side) * (message.width // side))):
        raise ValueError("diffusers draws the noise of each step itself, so its image is another one")


def hold_noise_scheduler(subject: Subject) -> list[Check]:
    """Hold the points and the solver to diffusers' own class, on numbers small enough to take no time."""
    config, settings = subject.run.config, subject.run.noise_scheduler
    if not config.task.fidelity_peer or settings is None:  # the checkpoint's own class is in the peer engine
        return []
    message, side = to_message(config.request), config.model.size_multiple
    steps, tokens = message.steps, (message.height // side) * (message.width // side)

    def measure() -> tuple[str, float] | None:
        from schedulers.published.peer import difference_from_diffusers  # imports torch

        found = difference_from_diffusers(settings, steps, tokens)
        return None if found is None else (found.class_name, found.rel_l2)

    scheduler = to_dict(config)["scheduler"]
    found = subject.references.finding(["noise scheduler", scheduler, steps, tokens], measure)
    if found is None:
        raise ValueError("diffusers has no class of these settings")
    return [Check("noise scheduler", found[1], ROUNDING, f"diffusers' {found[0]}")]


def hold_operators(subject: Subject) -> list[Check]:
    """Hold code that exists in one dtype only to float64; the ranks have measured it as they loaded."""
    operators = subject.measured.info.operators
    rows = [Check("operators", row.rel_l2, row.bound, f"{row.operator} in float64") for row in operators]
    return sorted(rows, key=lambda row: row.error / row.bound)[-1:]


CHECKS: Mapping[str, Callable[[Subject], list[Check]]] = {
    "the run is": hold_run,
    "the repeats are": hold_repeats,
    "the method in float32 is": hold_method,
    "the operators are": hold_operators,
    "the arithmetic that run and reference share is": hold_shared_arithmetic,
    "the noise scheduler is": hold_noise_scheduler,
}
"""The checks, by what they hold."""


def _check(name: str, errors: Errors, floor: Errors, against: str) -> Check:
    """Return the check of the latent or the pixel, whichever is nearer to its bound or further beyond."""
    rows = [Check(name, error, rounding_bound(least), against) for error, least in zip(errors, floor, strict=True)]
    return max(rows, key=lambda row: row.error / row.bound if row.error == row.error else float("inf"))


def _check_float32(subject: Subject, name: str, errors: Errors, against: str) -> Check:
    """Return the check of the errors between two float32 outputs.

    Rounding makes less than 1e-5 of nearly every request. Only for a larger error another output is generated, which
    tells how much of it rounding can make.
    """
    if max(errors) <= ROUNDING:
        return Check(name, max(errors), ROUNDING, against)
    config = floor_config(subject.run.config)
    set_float32(config)
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


def rel_l2_by_step(reference: GeneratedOutput, output: GeneratedOutput) -> list[float]:
    """Return the relative L2 error of the state after every solver step, over all images."""
    steps = range(len(reference.latents[0]))
    return [difference([x[i] for x in reference.latents], [x[i] for x in output.latents]).rel_l2 for i in steps]


def _size(row: Difference) -> float:
    return row.rel_l2 if row.rel_l2 == row.rel_l2 else float("inf")  # NaN is the largest error


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]
