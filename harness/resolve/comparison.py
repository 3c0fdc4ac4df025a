"""The two configurations of task=compare, or of task=load if it compares, as lists of overrides.

On the command line: `compare.a='[parallel=single]' compare.b='[parallel=ulysses2,attention=flash]'`.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.grammar.gen.OverrideLexer import InputStream, OverrideLexer  # type: ignore[attr-defined]

from harness.config.schema import RunConfig
from harness.config.tasks import TRAITS
from harness.resolve.quoting import quote_value

COMPARED = ("a", "b")
KEYS = tuple(f"compare.{name}" for name in COMPARED)
BRACKETS = {"[": 1, "{": 1, "(": 1, "]": -1, "}": -1, ")": -1}


def is_compared_key(override: str) -> bool:
    """Return whether an override sets one of the two configurations of a comparison."""
    return override.partition("=")[0] in KEYS


def quote_overrides(argument: str) -> str:
    """Put each override inside an argument compare.a=[...] or compare.b=[...] in quotes.

    Hydra's grammar wants quotes round a value that holds an `=`, and round one with letters outside ASCII.

    Args:
        argument: One argument of the command line.

    Returns:
        The argument with quotes inside its list; any other argument with quotes only where Hydra wants them.
    """
    key, _, value = argument.partition("=")
    if key not in KEYS or not value.startswith("["):
        return quote_value(argument)
    return f"{key}={','.join(_quote_list(part) for part in split_list(value))}"


def _quote_list(text: str) -> str:
    if not (text.startswith("[") and text.endswith("]")):
        return text
    return f"[{','.join(_quote(part) for part in split_list(text[1:-1]))}]"


def _quote(override: str) -> str:
    return override if override[:1] in ("'", '"') else QuotedString(override, Quote.double).with_quotes()


def split_list(text: str) -> list[str]:
    """Return the parts between commas outside brackets and quotes, stripped; an empty text has none."""
    lexer = OverrideLexer(InputStream(text))
    lexer.removeErrorListeners()
    lexer.mode(OverrideLexer.VALUE_MODE)
    parts, depth, start = [], 0, 0
    for token in lexer.getAllTokens():
        symbol = token.text.strip()
        depth += BRACKETS.get(symbol, 0)
        if symbol == "," and depth == 0:
            parts.append(text[start : token.start])
            start = token.stop + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def comparison_overrides(common: Sequence[str], own: Sequence[str], config: RunConfig) -> list[str]:
    """Return the overrides of one of the two compared runs.

    Args:
        common: The overrides of the comparison.
        own: The overrides of this run only, which have the last word.
        config: The comparison's configuration, whose repeats the run gets.

    Returns:
        The overrides of a bench or a load of its own.
    """
    kept = [override for override in common if override.partition("=")[0] not in (*KEYS, "task", "rerun_of")]
    counts = [f"task.warmup={config.task.warmup}", f"task.repeats={config.task.repeats}"]
    task = TRAITS[config.task.name].compared_as or config.task.name
    fidelity = f"task.fidelity={str(config.task.fidelity).lower()}"
    return [*kept, *own, f"task={task.name}", *counts, fidelity, "compare.a=null", "compare.b=null"]
