"""The tables of parity with diffusers: `make parity` measures them again and writes them between the marks."""

import re
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import diffusers
import torch

from schedulers.published import from_diffusers
from schedulers.published.classes import BUILDERS
from schedulers.published.options import UNSUPPORTED
from tests.fixtures.schedulers.known_differences import KNOWN, explanations
from tests.fixtures.schedulers.parity import compare
from tests.fixtures.schedulers.published_cases import CASES, REFUSALS, at_all_steps
from tests.fixtures.schedulers.steps import STEPS as COUNTS
from tests.fixtures.schedulers.steps import Outcome, outcome

PAGE = Path(__file__).parents[2] / "schedulers" / "published" / "README.md"
MARKS = ("<!-- parity -->", "<!-- /parity -->")
STEPS_MARKS = ("<!-- steps -->", "<!-- /steps -->")
STEPS = (5, 10, 20, 50)
SHORT = {
    "beta_schedule": "betas",
    "beta_start": "betas",
    "beta_end": "betas",
    "num_train_timesteps": "betas",
    "trained_betas": "betas",
    "prediction_type": "prediction",
    "timestep_spacing": "spacing",
    "steps_offset": "offset",
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta sigmas",
    "use_flow_sigmas": "flow sigmas",
    "flow_shift": "shift",
    "use_dynamic_shifting": "dynamic shift",
    "time_shift_type": "dynamic shift",
    "max_shift": "dynamic shift",
    "max_image_seq_len": "dynamic shift",
    "final_sigmas_type": "last sigma",
    "rescale_betas_zero_snr": "zero terminal SNR",
    "sample_max_value": "thresholding",
    "sigma_min": "sigma ends",
    "sigma_max": "sigma ends",
}
"""The table's names of options; several options may have one name."""


def worst(name: str, wide: bool) -> float:
    """Return the largest relative difference of a class's trajectories, over its configurations and STEPS."""
    runs = [compare(case, tuple(n for n in STEPS if n <= case.most), wide) for case in CASES if case.name == name]
    return max(difference.state for several in runs for difference in several)


def refused(name: str) -> str:
    """Return each refused option with the reason that from_diffusers gives; equal reasons are joined."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for options in REFUSALS.get(name, []):
        try:
            from_diffusers({"_class_name": name, **options})
        except ValueError as error:
            option, reason = str(error).removeprefix(f"{name} with ").split(" is not supported: ", 1)
            reasons[reason].append(f"`{option}`")
    return "; ".join(f"{', '.join(dict.fromkeys(options))}: {reason}" for reason, options in reasons.items())


def table() -> str:
    """Return the table and the list of classes without a counterpart, as Markdown."""
    rows = [
        f"Each configuration at {', '.join(map(str, STEPS))} steps. The worst max|a - b| / max|b| of the final state,",
        "as published (float32) and with diffusers' float32 read as float64, which shows that the rest is rounding.",
        "",
        "| class of diffusers | configurations run, options varied | float32 | float64 | refused |",
        "|---|---|---|---|---|",
    ]
    for name in BUILDERS:
        cases = [case for case in CASES if case.name == name]
        options = {SHORT.get(option, option) for case in cases for option in case.options} - {""}
        varied = f"{len(cases)}: {', '.join(sorted(options))}"
        rows.append(f"| {name} | {varied} | {worst(name, False):.0e} | {worst(name, True):.0e} | {refused(name)} |")
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in UNSUPPORTED.items():
        reasons[reason].append(name.removesuffix("Scheduler"))
    rows += ["", "Without a counterpart, and refused by name:", ""]
    rows += [f"- {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    return "\n".join(rows)


def cell(outcomes: list[Outcome]) -> str:
    """Return the worst difference of the outcomes that agree, and the numbers of the known differences of the others.

    Args:
        outcomes: The outcomes of one class at one number of steps.

    Returns:
        The cell, such as `3e-15 (2, 7)`.

    Raises:
        ValueError: A difference is not a known one.
    """
    found = [(o, explanations(o)) for o in outcomes if not o.agrees]
    missing = [str(o) for o, rows in found if not rows]
    if missing:
        raise ValueError(f"no known difference explains {missing[0]}")
    numbers = sorted({rows[0] + 1 for _, rows in found})
    equal = [o.state for o in outcomes if o.agrees and not o.ours]
    worst_of = f"{max(equal):.0e}" if equal else "-"
    return f"{worst_of} ({', '.join(map(str, numbers))})" if numbers else worst_of


def steps_table() -> str:
    """Return the table of all classes at every number of steps, and the known differences, as Markdown."""
    rows = [
        "Each configuration at few, usual and all steps, in float64; at 999 and 1000 steps, some of them, spaced",
        "differently. The worst max|a - b| / max|b| of the final state; a dash: none runs alike.",
        "A number in brackets is a known difference of some of them, listed below. Without one, neither side runs.",
        "",
        f"| class of diffusers | {' | '.join(map(str, COUNTS))} |",
        "|---" * (len(COUNTS) + 1) + "|",
    ]
    for name in BUILDERS:
        every = [case for case in CASES if case.name == name]
        cells = [cell([outcome(c, n) for c in (every if n < 900 else at_all_steps(name))]) for n in COUNTS]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", *known_differences()])


def known_differences() -> list[str]:
    """Return the table of known differences, as lines of Markdown."""
    rows = ["| | where | diffusers | here |", "|---|---|---|---|"]
    return [*rows, *(f"| {k} | {row.where} | {row.theirs} | {row.ours} |" for k, row in enumerate(KNOWN, 1))]


def write(text: str, page: Path = PAGE, marks: tuple[str, str] = MARKS) -> None:
    """Put the text between the marks; raise ValueError where they are missing."""
    content = page.read_text()
    found = re.search(f"{re.escape(marks[0])}.*{re.escape(marks[1])}", content, re.DOTALL)
    if found is None:
        raise ValueError(f"{page.name} has no {marks[0]} and {marks[1]} to write between")
    page.write_text(content[: found.start()] + f"{marks[0]}\n{text}\n{marks[1]}" + content[found.end() :])


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    for measure, marks in ((table, MARKS), (steps_table, STEPS_MARKS)):
        measured = measure()
        sys.stdout.write(measured + "\n")
        write(measured, marks=marks)
