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
from http import HTTPStatus

from rich.console import Console
from rich.markup import escape

SERVER = "https://api.wandb.ai"
SERVERS = (SERVER, "https://api.forge.coreweave.com")  # one server; `wandb login` keeps a key under either name
ANSWER_S = 6.0  # longest wait for an answer: looking up the name, connecting and reading
QUERY = {"query": "query { serverInfo { cliVersionInfo } }"}


def server_url() -> str:
    """Return the address of the wandb server: WANDB_BASE_URL, or wandb's own."""
    return os.environ.get("WANDB_BASE_URL") or SERVER


class Server:
    """The wandb server, which is asked once whether it answers.

    Args:
        url: The address of the server.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._is_checked = False
        self._note: str | None = None

    def offline_note(self) -> str | None:
        """Return a note that runs are logged offline because the server does not answer, or None if it does.

        The first call asks the server; it takes ANSWER_S at most.
        """
        if not self._is_checked:
            fault: list[str | None] = []
            thread = threading.Thread(target=lambda: fault.append(_fault(self.url)), name="wandb", daemon=True)
            thread.start()
            thread.join(ANSWER_S)
            reason = fault[0] if fault else f"no answer within {ANSWER_S:g} s"
            self._is_checked = True
            if reason is not None:
                self.give_up(reason)
        return self._note

    def give_up(self, reason: str) -> None:
        """Log offline from now on, and print a note that says why."""
        self._is_checked = True
        self._note = f"wandb: {self.url} takes no run ({reason}); logged offline, to be uploaded with `wandb sync`"
        Console(stderr=True).print(f"[yellow]note:[/yellow] {escape(self._note)}", highlight=False, soft_wrap=True)


@cache
def server(url: str) -> Server:
    """Return the server at an address, always the same object in a process."""
    return Server(url)


def _fault(url: str) -> str | None:
    """Return why a server does not answer as wandb does, or None. What it says of this user does not matter."""
    body, headers = json.dumps(QUERY).encode(), {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/graphql", data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            if not isinstance(json.loads(answer.read()), dict):
                return "it does not answer as wandb does"
    except urllib.error.HTTPError as error:  # of a proxy, unless the server asks who this user is
        return None if error.code in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED) else f"HTTP {error.code}"
    except json.JSONDecodeError:
        return "it does not answer as wandb does"
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            return None  # it answers, and wandb may know its certificate
        return " ".join(str(reason).split()) or type(error).__name__
    return None
