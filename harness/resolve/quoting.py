"""Values of the command line that Hydra's grammar takes only in quotes: letters outside ASCII, and marks such as `!`.

Quotes round such a value are added. A value that is wrong in another way is shown in the quotes that it needs.
"""

from __future__ import annotations

import re
import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

PARTS = re.compile(
    r"""(?P<quoted>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')   # a quoted text
    |(?P<code>\$\{[^}]*\})                                # an interpolation
    |(?P<mark>[\[\]{}(),])                                # brackets and the commas between values
    |(?P<blank>[ \t]+(?=["']))                            # blanks before a quoted text
    |(?P<plain>(?:\\.|\$(?!\{)|[^\[\]{}(),$\\])+|.)       # anything else""",
    re.VERBOSE | re.DOTALL,
)
UNQUOTED = re.compile(r"""[^A-Za-z0-9_/\\+.$%*@?|~\-\ \t,\[\]{}():='"]""")  # what Hydra's grammar has only in quotes
ESCAPED = re.compile(r"\\([\\()\[\]{}:=, \t])")


def quote_value(argument: str) -> str:
    """Put a value, or each of several, in quotes if it has letters that Hydra's grammar takes only there.

    Args:
        argument: One argument of the command line, such as `request.prompt=é` or `request.prompts=[狐,é]`.

    Returns:
        The argument; unchanged if it needs no quotes or has them.
    """
    key, equals, value = argument.partition("=")
    if not UNQUOTED.search(value):
        return argument
    quoted, braces = "", 0
    for part in PARTS.finditer(value):
        text = part[0]
        braces += {"{": 1, "}": -1}.get(text, 0)
        if part.lastgroup == "plain" and UNQUOTED.search(text):
            name, colon, rest = text.partition(":") if braces else ("", "", text)  # of a dictionary in braces
            text = f"{name}{colon}{_quoted(rest)}" if rest else text
        quoted += text
    return f"{key}{equals}{quoted}" if _is_override(f"{key}{equals}{quoted}") else argument


def _is_override(text: str) -> bool:
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        return False
    return True


def _quoted(text: str) -> str:
    """Return a text in quotes; the blanks round it stay outside."""
    word = ESCAPED.sub(r"\1", text.strip())
    blanks = len(text) - len(text.lstrip())
    return f"{text[:blanks]}{QuotedString(word, Quote.double).with_quotes()}"


def shell_quoted(argument: str) -> str | None:
    """Return an argument as a shell takes it, with its whole value in quotes; None if that does not help either."""
    key, _, value = argument.partition("=")
    text = f"{key}={QuotedString(value, Quote.double).with_quotes()}"
    return shlex.quote(text) if _is_override(text) else None
