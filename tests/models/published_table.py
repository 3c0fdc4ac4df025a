"""Write the page's table of published checkpoints: `python -m tests.models.published_table`."""

from pathlib import Path

from tests.fixtures.models.published import CHECKPOINTS, pair

PAGE = Path(__file__).parents[2] / "models" / "README.md"
BEGIN, END = "<!-- models -->", "<!-- /models -->"
HEADER = "| `model=` | published as | network of diffusers | parameters | tensors mapped | left over: theirs, ours |"


def table() -> str:
    """Return the table, one row for each checkpoint."""
    return "\n".join([HEADER, "|---|---|---|---|---|---|", *(row(name) for name in CHECKPOINTS)])


def row(name: str) -> str:
    """Return the row of one checkpoint: sizes, and how many names or shapes of either library have no partner."""
    found = pair(name)
    prefix = "" if found.names.pairs else f"{next(iter(found.ours.state_dict())).partition('.')[0]}."
    mine = {(key.removeprefix(prefix), tuple(t.shape)) for key, t in found.ours.state_dict().items()}
    theirs = {(found.names.to_native(key), tuple(t.shape)) for key, t in found.theirs.state_dict().items()}
    size = sum(parameter.numel() for parameter in found.ours.parameters())
    shown = f"{size / 1e9:.2f} B" if size >= 1e9 else f"{size / 1e6:.1f} M"
    cells = (
        f"`{name}`",
        found.config.model.hub or "",
        type(found.theirs).__name__,
        shown,
        str(len(mine & theirs)),
        f"{len(theirs - mine)}, {len(mine - theirs)}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Replace the table between the page's markers."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
