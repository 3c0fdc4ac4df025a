"""Whether the wandb server answers: asked once in a process, so that all jobs of a sweep go to the same place."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import threading
import urllib.error
import urllib.request
from functools import cache

from rich.console import Console
from rich.markup import escape

SERVER = "https://api.wandb.ai"
ANSWER_S = 6.0  # longest wait for an answer: looking up the name, connecting and reading
QUERY = {"query": "query { serverInfo { cliVersionInfo } }"}


def server_url() -> str:
    """Return the address of the wandb server: WANDB_BASE_URL, or wandb's own."""
    return os.environ.get("WANDB_BASE_URL") or SERVER


@cache
def offline_note(url: str) -> str | None:
    """Return a note that runs are logged offline because the server does not answer, or None if it does.

    The first call in a process asks the server, and prints the note; it takes ANSWER_S at most.
    """
    fault: list[str | None] = []
    thread = threading.Thread(target=lambda: fault.append(_fault(url)), name="wandb-connection", daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    reason = fault[0] if fault else f"no answer within {ANSWER_S:g} s"
    if reason is None:
        return None
    note = f"wandb: {url} cannot be reached ({reason}); logged offline, to be uploaded with `wandb sync`"
    Console(stderr=True).print(f"[yellow]note:[/yellow] {escape(note)}", highlight=False, soft_wrap=True)
    return note


def _fault(url: str) -> str | None:
    """Return why a server does not answer as wandb does, or None. What it says of this user does not matter."""
    body, headers = json.dumps(QUERY).encode(), {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/graphql", data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else f"HTTP {error.code}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            return None  # it answers, and wandb may know its certificate
        return " ".join(str(reason).split()) or type(error).__name__
    return None
