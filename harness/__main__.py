"""Entry point of `python -m harness` and of the installed command, `triptych`."""

import os
import sys


def leave_working_folder() -> None:
    """Search the working folder for modules no longer, unless it is this package's own or PYTHONPATH names it.

    `python -m` puts it first, and an empty entry of PYTHONPATH means it too. A torch.py or a folder models/ of the user
    would replace the real one there. This is done before anything else is imported.
    """
    named = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    own, working = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.abspath(".")
    if working not in (own, *named):
        library = os.path.dirname(os.__file__)
        first = sys.path.index(library) if library in sys.path else len(sys.path)
        sys.path[:first] = [entry for entry in sys.path[:first] if os.path.abspath(entry) != working]


def main() -> None:
    """Run the command line."""
    leave_working_folder()
    from harness.cli import main as run

    run()


if __name__ == "__main__":
    main()
