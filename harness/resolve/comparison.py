"""The two sides of task=compare, or of task=load: `a='[parallel=single]' b='[parallel=ulysses2,attention=flash]'` as
override lists.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.config.schema import RunConfig, Task

SIDES = ("a", "b")
BRACKETS = {"[": 1, "{": 1, "(": 1, "]": -1, "}": -1, ")": -1}


def quoted(argument: str) -> str:
    """An argument a=[...] or b=[...] with each override in quotes, as Hydra's grammar wants what holds an `=`; any
    other argument as it is.
    """
    key, _, value = argument.partition("=")
    if key not in SIDES or not value.startswith("["):
        return argument
    return f"{key}={','.join(_quoted_list(part) for part in split(value))}"


def _quoted_list(text: str) -> str:
    if not (text.startswith("[") and text.endswith("]")):
        return text
    return f"[{','.join(_quoted(part) for part in split(text[1:-1]))}]"


def _quoted(override: str) -> str:
    if override[:1] in ("'", '"'):
        return override
    escaped = override.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def split(text: str) -> list[str]:
    """The parts between commas that no bracket or quote encloses, stripped; none of an empty text."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += BRACKETS.get(letter, 0)
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def check_sides(config: RunConfig) -> None:
    """Refuses a comparison without sides, and sides of what compares nothing.

    Raises:
        ValueError: what to change.
    """
    given = {name: getattr(config, name) for name in SIDES}
    if config.task.name is Task.compare:
        if lacking := [name for name, side in given.items() if side is None]:
            raise ValueError(
                f"task=compare needs two sides; add {' '.join(f'{n}=[...]' for n in lacking)}, lists of overrides such "
                "as b='[parallel=ulysses2]' ([] changes nothing)"
            )
    elif config.task.name is Task.load:
        if len([side for side in given.values() if side is not None]) == 1:
            raise ValueError("task=load compares two sides; give a=[...] and b=[...], or neither")
    elif stray := [name for name, side in given.items() if side is not None]:
        raise ValueError(f"{' and '.join(stray)} have an effect with task=compare or load only; add one, or drop them")


def side_overrides(common: Sequence[str], side: Sequence[str], config: RunConfig) -> list[str]:
    """The overrides of one side's own run: those of both, then its own, which have the last word; its repeats are the
    comparison's.
    """
    kept = [override for override in common if override.partition("=")[0] not in (*SIDES, "task")]
    counts = [f"task.warmup={config.task.warmup}", f"task.repeats={config.task.repeats}"]
    task = "task=load" if config.task.name is Task.load else "task=bench"
    return [*kept, *side, task, *counts, "task.fidelity=false", "a=null", "b=null"]
