"""Whether the wandb server has the project of a run, asked before a process starts."""

from __future__ import annotations

import base64
import json
import netrc
import os
import urllib.error
import urllib.request
from contextlib import suppress
from functools import cache
from http import HTTPStatus
from typing import Any
from urllib.parse import urlparse

import msgspec
from rich.console import Console
from rich.markup import escape

from harness.config.schema import WandbConfig
from harness.config.yaml import ConfigError
from harness.loggers.connection import ANSWER_S, SERVERS, server_url

VIEWER = "query { viewer { entity } }"
PROJECT = """query ($project: String!, $entity: String!) {
  entity(name: $entity) { name }
  project(name: $project, entityName: $entity) { name }
}"""
OTHERWISE = "or use logger.wandb.mode=offline"


class Found(msgspec.Struct, frozen=True):
    """What the server says of a project.

    Attributes:
        fault: Why it takes no run there, in one line; None if it does, or did not say.
        entity: User or team of the project; empty if the server did not say.
        exists: Whether the project exists; wandb makes one that does not.
    """

    fault: str | None = None
    entity: str = ""
    exists: bool = True


def api_key() -> str | None:
    """Return the API key, from the environment or from ~/.netrc, where `wandb login` puts it; None without one."""
    if os.environ.get("WANDB_API_KEY"):
        return os.environ["WANDB_API_KEY"]
    urls = SERVERS if server_url() in SERVERS else (server_url(),)
    with suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc()
        found = [known.authenticators(urlparse(url).hostname or "") for url in urls]
        return next((entry[2] for entry in found if entry is not None), None)
    return None


def check_project(config: WandbConfig, project: str) -> None:
    """Refuse a user, team or API key that the server does not know; print a note on a project that it will make.

    Args:
        config: The `logger.wandb` group of a run that is logged online.
        project: Name of the project.

    Raises:
        ConfigError: The server takes no run there; one line says what to change.
    """
    if os.environ.get("WANDB_SWEEP_ID") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return  # wandb's agent has found the project, or wandb logs in by itself
    key = api_key()
    if key is None:
        raise ConfigError(f"logger.wandb.mode=online needs an API key; give one with `wandb login`, {OTHERWISE}")
    found = find_project(server_url(), key, project, config.entity or os.environ.get("WANDB_ENTITY") or "")
    if found.fault is not None:
        raise ConfigError(found.fault)
    if not found.exists and (config.project or os.environ.get("WANDB_PROJECT")):
        note = f"wandb has no project {found.entity}/{project} yet and makes it; another is logger.wandb.project=NAME"
        Console(stderr=True).print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False, soft_wrap=True)


@cache
def find_project(url: str, key: str, project: str, entity: str) -> Found:
    """Ask the server for a project, once in a process.

    Args:
        url: Address of the server.
        key: The API key.
        project: Name of the project.
        entity: User or team; empty for the user's default one.

    Returns:
        What it says. A question that it does not answer leaves all open: wandb itself will say what is wrong.
    """
    bad_key = f"{url} does not know your API key; give it with `wandb login --relogin`, {OTHERWISE}"
    try:
        viewer = {"entity": entity} if entity else _ask(url, key, VIEWER)["viewer"]
        if viewer is None:
            return Found(bad_key)
        entity = viewer["entity"]
        answer = _ask(url, key, PROJECT, project=project, entity=entity)
        known, exists = answer["entity"] is not None, answer["project"] is not None
    except urllib.error.HTTPError as error:
        return Found(bad_key if error.code == HTTPStatus.UNAUTHORIZED else None)
    except (OSError, ValueError, KeyError, TypeError):
        return Found()
    if not known:
        return Found(f"wandb has no user or team {entity}; correct logger.wandb.entity or WANDB_ENTITY, {OTHERWISE}")
    return Found(None, entity, exists)


def _ask(url: str, key: str, query: str, **variables: str) -> dict[str, Any]:
    """Return the data that the server answers a query with; a ValueError if it has none."""
    token = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}"}
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(f"{url.rstrip('/')}/graphql", data=body, headers=headers)
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        data = json.loads(answer.read())["data"]
    if not isinstance(data, dict):
        raise ValueError("no data")
    return data
