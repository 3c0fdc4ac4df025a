"""The page: data, style, script and plotly in one HTML file that fetches nothing.

Text of records is only ever data. It reaches the page as JSON in which no tag can begin, and the script inserts it as
text, never as markup. A content security policy enforces both, and that nothing is fetched.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape

from harness.config.schema import RunConfig
from harness.records.record import Status, write_atomically
from harness.resolve.compose import ConfigError
from harness.tasks.report.rows import ReportRow, read_table

FILE = "report.html"
SCRIPTS = ("page.base.js", "page.table.js", "page.figures.js", "page.sections.js", "page.js")
ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class Page(msgspec.Struct, frozen=True):
    """The data that the page's script reads.

    Attributes:
        root: The folder whose runs the page shows.
        made: The time at which the page was made.
        base: The folder relative to the page, for links.
        keys: The configuration keys that differ between the runs.
        rows: One row per run.
    """

    root: str
    made: str
    base: str
    keys: list[str]
    rows: list[ReportRow]


def write_report(config: RunConfig, console: Console) -> Status:
    """Write the page over a folder of runs, by default into that folder.

    Args:
        config: The resolved configuration.
        console: Console for the summary line.

    Returns:
        The status.

    Raises:
        ConfigError: plotly is missing, the folder is missing or has no run, or the page cannot be written.
    """
    root = Path(config.report.runs or "")
    script = plotly_script()
    if not root.is_dir():
        raise ConfigError(f"report.runs={root}: there is no such folder; give one that holds runs")
    table = read_table(root)
    if not table.rows:
        raise ConfigError(f"report.runs={root} holds no run (a folder with a status.json); give one that does")
    out = Path(config.report.out) if config.report.out is not None else root / FILE
    base = Path(os.path.relpath(root.resolve(), out.parent.resolve())).as_posix()
    page = Page(str(root), f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", base, table.keys, table.rows)
    text = render(page, script)
    try:
        write_atomically(out, text.encode())
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}); choose another with report.out=...") from error
    states = Counter(row.state for row in table.rows)
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    console.print(
        f"{escape(str(out))}: {len(table.rows)} runs ({counted}), {len(text.encode()) / 1e6:.1f} MB", soft_wrap=True
    )
    return Status("ok")


def render(page: Page, plotly: str) -> str:
    """Return the HTML of a page, with plotly's script in it."""
    files = importlib.resources.files(__package__)
    parts = {
        "style": files.joinpath("page.css").read_text(),
        "plotly": plotly,
        "data": as_script(page),
        "script": "\n".join(files.joinpath(name).read_text() for name in SCRIPTS),
    }
    # in one pass, so that a placeholder inside an inserted part is not replaced
    return re.sub(r"/\*(\w+)\*/", lambda match: parts[match[1]], files.joinpath("page.html").read_text())


def as_script(page: Page) -> str:
    """Return the page as JSON that no tag, comment or line end of HTML or JavaScript can end."""
    text = msgspec.json.encode(page).decode()
    return "".join(ESCAPED.get(letter, letter) for letter in text)


def plotly_script() -> str:
    """Return plotly's own JavaScript, from its package.

    Returns:
        The script.

    Raises:
        ConfigError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ConfigError("task=report needs plotly; pip install 'triptych[report]'") from error
    script: str = get_plotlyjs()
    return script
