"""Text that a command keeps up to date inside a page written by people: the text between two comment markers."""

from __future__ import annotations


def replace_between(text: str, name: str, content: str) -> str:
    """Replace the text between `<!-- name:begin -->` and `<!-- name:end -->`; the markers stay.

    Args:
        text: The page.
        name: Name in the markers.
        content: The new text.

    Returns:
        The new page.

    Raises:
        ValueError: A marker is missing or there twice, or they are in the wrong order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page needs {begin} once and after it {end} once")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content.strip()}\n{end}{rest.split(end)[1]}"
