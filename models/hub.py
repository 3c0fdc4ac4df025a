"""A checkpoint by its name on the Hugging Face hub: downloaded once by the launcher, found offline by every rank.

Only the files that an architecture reads are downloaded, and never a pickle.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from models.files import STEMS, CheckpointError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SINGLE_FOLDER_FILES = ("config.json", "scheduler_config.json", *(f"{stem}.safetensors" for stem in STEMS))
TOKENIZER = ("*.json", "*.txt", "*.model", "*.jinja")


def is_hub_name(path: str) -> bool:
    """Return whether a path that does not exist has the form of a hub name, `organisation/name`."""
    return HUB_NAME.fullmatch(path) is not None and not Path(path).expanduser().exists()


def download_patterns(weights: Iterable[str], configs: Iterable[str]) -> list[str]:
    """Return the files to download, as patterns.

    Args:
        weights: Folders whose config.json and safetensors are read.
        configs: Folders of which only small files are read: tokenizers, the noise scheduler, networks without weights.
    """
    found = ["model_index.json"]
    for folder in weights:
        found.append(f"{folder}/config.json")
        for stem in STEMS:
            names = (f"{stem}.safetensors", f"{stem}-*-of-*.safetensors", f"{stem}.safetensors.index.json")
            found += [f"{folder}/{name}" for name in names]
    return found + [f"{folder}/{name}" for folder in configs for name in TOKENIZER]


def snapshot(name: str, revision: str | None, patterns: Sequence[str], fetch: bool) -> Path:
    """Return the folder of a hub checkpoint in the local cache, `.../snapshots/COMMIT`.

    Args:
        name: The checkpoint's name, `organisation/name`.
        revision: A branch, tag or commit; None for the main branch.
        patterns: The files to download, as patterns.
        fetch: Whether to use the network; false uses the cache only.

    Raises:
        CheckpointError: No such name or revision, no access to it, or no network and nothing in the cache.
    """
    from huggingface_hub import errors, snapshot_download

    at = "" if revision is None else f" at revision {revision}"
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=not fetch)
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"model.path={name}: its licence must be accepted first: do so on huggingface.co/{name}, then log in with "
            "`hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"model.path={name}: the hub has no revision {revision} of it") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"model.path={name}: no such folder here, and no such name on the hub") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HFValidationError) as error:
        raise CheckpointError(
            f"model.path={name}: no such folder here, not in the hub's local cache{at}, and the hub cannot be reached; "
            "give a folder, or run once with network access"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"model.path={name}: the hub could not be reached ({line})") from error
    return Path(found)


def commit(folder: Path) -> str | None:
    """Return the commit that a folder of the hub's cache holds, or None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None
