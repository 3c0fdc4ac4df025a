"""One prompt of a data set, and the error of a file that has none."""

from __future__ import annotations

import msgspec


class DatasetError(ValueError):
    """A file that cannot be used; one line has the file, the number of the line, and what to change."""


class DatasetPrompt(msgspec.Struct, frozen=True):
    """One prompt of a file.

    Attributes:
        index: Number of the prompt in the file, from 0.
        prompt: The prompt.
        id: Name of the prompt in its file; its index if the file has no names.
        line: Number of the line, from 1, or of the entry in a JSON file.
        categories: Categories that the prompt belongs to, for the tables.
        seed: Seed of its first image; None = by the rule of the run.
        negative_prompt: Negative prompt; None = the request's.
        height: Height in pixels; None = the request's.
        width: Width in pixels; None = the request's.
    """

    index: int
    prompt: str
    id: str
    line: int
    categories: tuple[str, ...] = ()
    seed: int | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None

    @property
    def has_own_request(self) -> bool:
        """Whether the file gives more of this image than its prompt."""
        return any(value is not None for value in (self.seed, self.negative_prompt, self.height, self.width))
