"""The house: its words, one class for a name, three modules in the root of harness/, docstrings in one dialect."""

import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("harness", "models", "schedulers")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FILES = [*SOURCES, *sorted({*(ROOT / "tests").rglob("*.py")} - {Path(__file__)})]
HARNESS_ROOT = {"__init__.py", "__main__.py", "cli.py", "messages.py"}

WORDS = {
    "ahead": "precompute, later",
    "asked": "requested",
    "beforehand": "precomputed",
    "course": "fiber",
    "dealt": "sharded",
    "desk": "service",
    "drawn": "generated, sampled",
    "draws": "samples",
    "drawing": "generation, generating",
    "gate": "cached block",
    "gates": "block cache",
    "judged": "checked",
    "lane": "cached stack",
    "lanes": "cached stacks",
    "owners": "cache_states",
    "passage": "cached forward",
    "picture": "image",
    "pictures": "images",
    "rival": "equal-latency baseline",
    "rivals": "equal-latency baselines",
    "tell": "embed_time, pass on",
    "tells": "embeds, passes on",
    "told": "time embedding, conditioned on",
}
"""Words of a language that only its authors knew, each with what to say instead."""
ALLOWED = {
    ("ahead", "harness/tasks/serve/"): "the number of requests ahead of one in the queue",
    ("ahead", "tests/harness/tasks/serve/"): "the same",
    ("ahead", "tests/end_to_end/test_supervisor.py"): "the same",
    ("ahead", "tests/fixtures/serving/"): "the same",
    ("gate", "models/"): "adaLN's gate, SwiGLU's gate, up and down",
    ("tell", "harness/search/study.py"): "Optuna's own name",
    ("pictures", "harness/resolve/names.py"): "the table of removed keys",
}
"""Where a word is the right one: part of the path, and the reason."""
NOT_FUNCTIONS = {*WORDS, "asks", "ended", "had", "kept", "written"}
"""Words that name no function: a participle hides whether something is computed, tested or stored."""
FRAGMENTS = ("for", "from", "its", "of", "that", "to", "when", "where", "which", "who", "whose", "with")
"""Words that no noun phrase begins with."""
MOST_WORDS = 25


def words_of(name: str) -> set[str]:
    """Return the words of an identifier, a key or a path: `GateMLP`, `told_of` and `a/told.py` have gate and told."""
    return {word.lower() for word in re.findall(r"[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]*", name)}


def private_words(path: str, names: Iterable[str]) -> list[str]:
    """Return what should be renamed in a file, and to which words."""
    return [
        f"{path}: {name}: not {word}, but {WORDS[word]}"
        for name in names
        for word in sorted(words_of(name) & WORDS.keys())
        if not any(word == allowed and path.startswith(place) for allowed, place in ALLOWED)
    ]


def names_in(source: str) -> set[str]:
    """Return the identifiers of a source, without those of tests, and the keys of its dictionaries."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    names = {token.string for token in tokens if token.type == tokenize.NAME}
    keys = (key for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Dict) for key in node.keys)
    texts = {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return {name for name in names if not name.startswith("test_")} | {text for text in texts if " " not in text}


def participles(source: str) -> list[str]:
    """Return the functions that are called by one word that names none."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return [node.name for node in functions if node.name.strip("_") in NOT_FUNCTIONS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_the_fields_words(path: Path) -> None:
    name, source = str(path.relative_to(ROOT)), path.read_text()
    assert private_words(name, [name, *sorted(names_in(source))]) == []
    assert participles(source) == []


def test_file_names_and_configuration_keys_are_the_fields_words() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for path in tracked or [str(path.relative_to(ROOT)) for path in FILES]:
        assert private_words(path, [path]) == []
    for path in (ROOT / "conf").rglob("*.yaml"):
        keys = re.findall(r"^\s*([\w.]+):", path.read_text(), re.MULTILINE)
        assert private_words(str(path.relative_to(ROOT)), keys) == []


def classes(sources: Iterable[str]) -> Iterator[str]:
    for source in sources:
        yield from (node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))


def repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def test_one_name_is_one_class() -> None:
    assert repeated(classes(path.read_text() for path in SOURCES)) == []


def test_the_root_of_harness_holds_the_command_and_the_messages() -> None:
    assert {path.name for path in (ROOT / "harness").glob("*.py")} == HARNESS_ROOT


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of every docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.:])\s", " ".join(text.split("\n\n")[0].split()))[0]


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each entry of a docstring's Args and Attributes, without its later lines."""
    for section in re.findall(r"^(?:Args|Attributes):\n((?: {4}.*(?:\n|$)|\n)+)", text, re.MULTILINE):
        yield from re.findall(r"^ {4}(\*{0,2}\w+)(?: \([^)]*\))?: *(.*)", section, re.MULTILINE)


def wrong_docstrings(source: str) -> list[str]:
    """Return what is wrong with the docstrings of a source, one line each."""
    wrong = []
    for line, text in docstrings(source):
        if re.search(r"\bSee the class\b", text):
            wrong.append(f"line {line}: say what it does, not where that is said")
        sentence = first_sentence(text)
        count = sum(any(character.isalpha() for character in word) for word in sentence.split())
        if count > MOST_WORDS:
            wrong.append(f"line {line}: {count} words in: {sentence}")
        for name, entry in entries(text):
            if entry.partition(" ")[0].lower().rstrip(",") in FRAGMENTS or entry.lower().startswith("whether it "):
                wrong.append(f"line {line}: no noun phrase that stands alone: {name}: {entry}")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_in_one_dialect(path: Path) -> None:
    assert wrong_docstrings(path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("harness/a.py", "told_of"),
        ("models/a.py", "GatesOfBlocks"),
        ("harness/caching/a.py", "gate"),
        ("harness/parallel/a.py", "_set_ahead"),
        ("tests/a.py", "ASKED"),
        ("harness/tasks/serve/desk.py", "harness/tasks/serve/desk.py"),
        ("conf/task/a.yaml", "max_pictures"),
    ],
)
def test_a_private_word_is_seen(path: str, name: str) -> None:
    assert private_words(path, [name])
    assert not private_words("models/a.py", ["gate_a", "repeat_interleave", "image", "navigate"])


def test_private_words_are_seen_in_a_source() -> None:
    assert {"told", "pictures", "lane"} <= names_in('def f(told):\n    return {"pictures": told.lane}')
    assert participles("def kept() -> None: ...") == ["kept"]
    assert not participles("def test_it_is_kept() -> None:\n    kept = 1")


def test_a_second_class_of_one_name_is_seen() -> None:
    assert repeated(classes(["class Row: ...", "def f():\n    class Row: ..."])) == ["Row"]


LONG = " ".join(["word"] * (MOST_WORDS + 1))


@pytest.mark.parametrize(
    "docstring",
    [
        "Run.\n\n    See the class.\n    ",
        f"{LONG}.",
        "Run.\n\n    Args:\n        folder: of its run.\n    ",
        "Run.\n\n    Args:\n        rank: the rank.\n        folder: Which has been\n            started.\n    ",
        "Run.\n\n    Attributes:\n        done: whether it has ended.\n    ",
    ],
)
def test_a_wrong_docstring_is_seen(docstring: str) -> None:
    assert wrong_docstrings(f'def f():\n    """{docstring}"""')


def test_a_right_docstring_is_left_alone() -> None:
    right = (
        "Run. A second sentence.\n\n    Args:\n        x: (B, C), of one image.\n        ok: whether the run ended.\n"
    )
    assert not wrong_docstrings(f'def f():\n    """{right}\n    Raises:\n        OSError: of the file.\n    """')
