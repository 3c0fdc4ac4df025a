"""The page's parity table names every mapped and every refused class, and nothing else."""

import re
from pathlib import Path

import pytest

from schedulers.published.options import DEFAULTS, UNSUPPORTED
from tests.fixtures.schedulers.known_differences import KNOWN
from tests.fixtures.schedulers.steps import ROUNDING, STEPS
from tests.schedulers.parity_table import MARKS, PAGE, STEPS_MARKS, known_differences, refused, write


def between_the_marks(marks: tuple[str, str] = MARKS) -> str:
    return PAGE.read_text().split(marks[0])[1].split(marks[1])[0]


def test_the_table_lists_exactly_the_mapped_classes() -> None:
    rows = re.findall(r"^\| (\w+Scheduler) \|", between_the_marks(), re.MULTILINE)
    assert sorted(rows) == sorted(DEFAULTS)
    listed = ", ".join(re.findall(r"^- ([\w, ]+):", between_the_marks(), re.MULTILINE)).split(", ")
    assert sorted(f"{name}Scheduler" for name in listed) == sorted(UNSUPPORTED)


def test_every_measured_difference_is_small() -> None:
    cells = re.findall(r"\| ([0-9]e-[0-9]+) \| ([0-9]e-[0-9]+) \|", between_the_marks())
    assert len(cells) == len(DEFAULTS)
    assert all(float(as_published) < 3e-4 and float(exact) < 1e-9 for as_published, exact in cells)


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_the_refusals_in_the_table_are_todays(name: str) -> None:
    (row,) = re.findall(rf"^\| {name} \|.*$", between_the_marks(), re.MULTILINE)
    assert row.endswith(f"| {refused(name)} |")


def test_writing_replaces_only_what_is_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    write("new", page)
    assert page.read_text() == f"before\n{MARKS[0]}\nnew\n{MARKS[1]}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no"):
        write("new", page)


def test_the_page_has_every_class_at_every_number_of_steps() -> None:
    """The slow test of the random files, and that of all steps, measure the numbers again."""
    text = between_the_marks(STEPS_MARKS)
    rows = re.findall(r"^\| (\w+Scheduler) \| (.*) \|$", text, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(DEFAULTS)
    for name, cells in rows:
        found = [re.fullmatch(r"(-|[0-9]e[-+][0-9]+)(?: \(([0-9, ]+)\))?", cell) for cell in cells.split(" | ")]
        assert len(found) == len(STEPS)
        assert all(found), name
        numbers = [cell.groups() for cell in found if cell is not None]
        assert all(error == "-" or float(error) < ROUNDING for error, _ in numbers), name
        assert {int(k) for _, known in numbers if known for k in known.split(", ")} <= set(range(1, len(KNOWN) + 1))
    assert "\n".join(known_differences()) in text
