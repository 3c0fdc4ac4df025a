"""The table of parity with diffusers: `make parity` measures it again and writes it between the marks."""

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
from tests.fixtures.schedulers.parity import compare
from tests.fixtures.schedulers.published_cases import CASES, REFUSALS

PAGE = Path(__file__).parents[2] / "schedulers" / "published" / "README.md"
MARKS = ("<!-- parity -->", "<!-- /parity -->")
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


def write(text: str, page: Path = PAGE) -> None:
    """Put the text between the marks; raise ValueError where they are missing."""
    content = page.read_text()
    found = re.search(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", content, re.DOTALL)
    if found is None:
        raise ValueError(f"{page.name} has no {MARKS[0]} and {MARKS[1]} to write between")
    page.write_text(content[: found.start()] + f"{MARKS[0]}\n{text}\n{MARKS[1]}" + content[found.end() :])


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    measured = table()
    sys.stdout.write(measured + "\n")
    write(measured)
