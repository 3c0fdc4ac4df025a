"""Every page can be followed: its links exist, its commands compose, and README.md keeps to its budget."""

import importlib.util
import re
import shlex
import statistics
import tomllib
from pathlib import Path

import pytest

from harness.resolve.comparison import quote_overrides
from harness.resolve.compose import compose_run, load_plugins_of
from harness.resolve.names import check_names
from harness.resolve.search_path import SearchPath
from tests.fixtures.own import OWN
from tests.fixtures.plugins import no_plugins_left

ROOT = Path(__file__).parent.parent
FOLDERS = (".github", "conf", "harness", "models", "notebooks", "schedulers", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
README = ROOT / "README.md"
README_BYTES = 12_288
README_LINE = 120  # characters
README_ROWS = 15  # of a table
README_MEDIAN = 16  # words of a sentence
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?:\]\(|^\[[^\]]+\]: )([^)\s]+)", re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor that a heading has on a rendered page."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(text: str) -> set[str]:
    """The anchors of a page."""
    return {slug(line) for line in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)}


def broken_links(page: Path, text: str) -> list[str]:
    """The links of a page whose file or heading does not exist."""
    broken = []
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in headings(file.read_text())):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_seen() -> None:
    text = "[a](README.md#no-such-heading) [b](no/such/file.md) [c](README.md#two-commands)"
    assert broken_links(README, text) == ["README.md#no-such-heading", "no/such/file.md"]


def commands(text: str) -> list[list[str]]:
    """The commands of a page, in code blocks and in code spans, as words; an indented line continues the last one."""
    found: list[str] = []
    for language, block in FENCE.findall(text):
        if language not in ("", "sh", "bash"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("    ") and found and "=" in line:
                found[-1] += f" {line.strip()}"
            else:
                found.append(line.removeprefix("$ "))
    found += re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    words = []
    for line in found:
        if re.match(r"(python -m |torchrun |pytest |make [a-z]|pip install )", line):
            words.append(shlex.split(line, comments=True))
    return words


def overrides_of(words: list[str], folder: str) -> list[str] | None:
    """The overrides of a command that runs the harness, with `folder` for DIR; None for any other command."""
    if "harness" not in words or words[words.index("harness") - 1] != "-m":
        return None
    found = []
    for word in words[words.index("harness") + 1 :]:
        key, _, value = word.partition("=")
        if word in ("-m", "...", "DIR", "mine") or word.startswith("--") or key == "from":
            continue
        if key in ("model.path", "model.vae.path", "model.revision", "model.lora", "quality.clip", "quality.features"):
            found.append("model.load=dummy")
        elif key in ("quality.reference", "KEY"):
            continue
        elif key == "hydra.searchpath":
            found.append(f"{key}={value.replace('DIR', str(OWN))}")
        elif key in ("dataset.file", "request.prompts_file"):
            found.append(f"{key}={prompt_file(value, folder)}")
        elif key == "plugins":
            found.append(f"plugins=[{folder}/{value.strip('[]')}]")
        else:
            found.append(f"{key}={value.replace('DIR', folder).replace('DATE/TIME', 'date/time')}")
    return [quote_overrides(override) for override in dict.fromkeys(found)]


def prompt_file(name: str, folder: str) -> Path:
    """A file of prompts of this name, with the columns that a table of them has."""
    file = Path(folder) / name
    header = {".tsv": "Prompt\tCategory\n", ".csv": "prompt\n"}.get(file.suffix, "")
    file.write_text(header + ("a kite\ttoys\n" if file.suffix == ".tsv" else "a kite\n") * 4)
    return file


def first_choice(override: str) -> str:
    """One job of a swept override."""
    key, _, value = override.partition("=")
    if value.startswith(("[", "{", "'", '"')) or "," not in value:
        return override
    return f"{key}={value.split(',')[0]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_is_one(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    monkeypatch.chdir(ROOT)
    with no_plugins_left():
        write_files(page.read_text(), tmp_path)
        check_commands(page, tmp_path, targets, extras, monkeypatch)


def write_files(text: str, folder: Path) -> None:
    """Write the Python blocks of a page that begin with a file's name."""
    for language, block in FENCE.findall(text):
        if language == "python" and (named := re.match(r"# (\w+\.py)\n", block)):
            (folder / named[1]).write_text(block)


def check_commands(
    page: Path, folder: Path, targets: list[str], extras: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in commands(page.read_text()):
        line = " ".join(words)
        overrides = overrides_of(words, str(folder))
        if overrides is not None:
            if "--help" in words or any(word.startswith("hydra/") for word in words) or "65" in line:
                continue
            sweep = "-m" in words[words.index("harness") :]
            monkeypatch.setenv("TRIPTYCH_CONF", str(OWN) if "--config-dir" in words else "")
            load_plugins_of(overrides, SearchPath.of_user())
            check_names(overrides, sweep=sweep)
            if not refused_on_purpose(line):
                composes(overrides, line)
        elif words[0] == "pytest" or words[:3] == ["python", "-m", "pytest"]:
            missing = [
                word for word in words if word.startswith("tests/") and not (ROOT / word.split("::")[0]).exists()
            ]
            assert not missing, line
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, line
        elif words[0] == "make":
            assert words[1] in targets, line
        elif words[0] == "pip":
            for names in re.findall(r"\[([\w,]+)\]", line):
                assert set(names.split(",")) <= set(extras), line


def refused_on_purpose(line: str) -> bool:
    """Whether a page shows this command for its refusal."""
    return "parallel.tp=3" in line


def composes(overrides: list[str], line: str) -> None:
    """Composes a run of a page's command, one job of a sweep."""
    try:
        compose_run([first_choice(override) for override in overrides])
    except Exception as error:
        raise AssertionError(f"{line}: {error}") from error


def sentences(text: str) -> list[str]:
    """The sentences of a page's prose: no code, tables, headings or list marks; a link counts as its words."""
    prose = FENCE.sub("", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    lines = [line for line in prose.splitlines() if line and not line.startswith(("|", "#", "!", "<"))]
    joined = re.sub(r"\n(?!- )", " ", "\n".join(lines))
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", joined)
    return [s for s in re.split(r"(?<=[.:!?])\s+|\n", plain) if re.search(r"\w", s)]


def test_the_readme_keeps_to_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text()
    size, longest = len(text.encode()), max(len(line) for line in text.splitlines())
    tables = [len(table.strip().splitlines()) - 2 for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)]
    median = statistics.median(len(sentence.split()) for sentence in sentences(text))
    with capsys.disabled():
        print(
            f"\nREADME.md: {size} bytes, median sentence {median:g} words, longest line {longest} characters, "
            f"longest table {max(tables)} rows, {len(LINK.findall(text))} links"
        )
    assert size <= README_BYTES
    assert longest <= README_LINE
    assert max(tables) <= README_ROWS
    assert median <= README_MEDIAN


def test_every_room_has_a_page_that_the_readme_or_the_rooms_page_links() -> None:
    """A page that nobody links is not read."""
    linked = set()
    for page in PAGES:
        for target in LINK.findall(page.read_text()):
            name = target.partition("#")[0]
            if name and not name.startswith("http"):
                linked.add((page.parent / name).resolve())
    alone = [str(page.relative_to(ROOT)) for page in PAGES if page not in linked and page != README]
    assert alone == []
