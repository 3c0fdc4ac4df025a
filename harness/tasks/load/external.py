"""A server that the run did not start: what it says of itself, how requests to it are written, and its record.

Nothing here is a guess about the server. The record has what was sent and what came back: this project's model, noise
scheduler and layout are not in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import msgspec

from harness.client.build_record import base_record
from harness.config.load import Dialect, LoadConfig
from harness.config.schema import RunConfig
from harness.config.yaml import to_dict
from harness.messages import EngineInfo
from harness.metrics.load import ServerRow
from harness.records.provenance import Beginning
from harness.records.record import AttentionRow, EngineRow, FirstCall, Record
from harness.resolve.compose import ResolvedRun
from harness.tasks.load.answers import describe_body, read_refusal
from harness.tasks.load.arrivals import ForeignRequest
from harness.tasks.load.dialects import DIALECTS, Wire

EXTERNAL = "external"
MODELS_ROUTE = "/v1/models"
SHOWN = 5  # models in a message
GROUPS = ("task", "load", "dataset", "logger", "tags", "notes", "meta")  # of the configuration, besides what was sent
TIMING = "the client's clock, from the time at which a request was due to the last byte of its answer"


class ModelPayload(msgspec.Struct):
    """The fields that are read from a model."""

    id: str
    owned_by: str | None = None


class ModelsPayload(msgspec.Struct):
    """The fields that are read from the answer of /v1/models."""

    data: list[ModelPayload]


@dataclass(frozen=True)
class ExternalServer:
    """A server at an address.

    Attributes:
        url: Root of the server.
        models: Models that it names.
        wire: How requests to it are written.
    """

    url: str
    models: list[ModelPayload]
    wire: Wire

    def row(self, request: ForeignRequest) -> ServerRow:
        """Return what the record says of it.

        Args:
            request: Any of the requests.
        """
        body = self.wire.body(request)
        inside = DIALECTS[self.wire.dialect].inside
        nested = body.get(inside, {}) if inside is not None else {}
        fields = [*(name for name in body if name != inside), *(nested if isinstance(nested, dict) else {})]
        owner = (self.models[0].owned_by or "") if self.models else ""
        dialect, models = self.wire.dialect.name, [model.id for model in self.models]
        return ServerRow(self.url, dialect, models, owner, self.wire.model, sorted(fields))


async def ask_server(client: httpx.AsyncClient, load: LoadConfig) -> ExternalServer:
    """Ask a server for its models, and choose the one that requests name.

    Args:
        client: The HTTP client, with the server's base URL.
        load: The configuration of the clients.

    Returns:
        The server.

    Raises:
        ValueError: No server answers there, it is none of an images API, it answers in another dialect, or the model
            is not clear; one line says what to change.
    """
    url = load.url or ""
    try:
        response = await client.get(MODELS_ROUTE)
    except httpx.HTTPError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"load.url={url}: no server answers there ({reason}); start it, or correct the address"
        ) from error
    models = read_models(response, load)
    owner = (models[0].owned_by or "") if models else ""
    right = [each for each, row in DIALECTS.items() if row.owner is not None and owner.startswith(row.owner)]
    if right and load.dialect not in (right[0], Dialect.openai):
        raise ValueError(
            f"load.dialect={load.dialect.name}, but the server at {url} says owned_by={owner}; use "
            f"load.dialect={right[0].name}"
        )
    return ExternalServer(url, models, Wire(load.dialect, choose_model(load, models), load.extra_body))


def read_models(response: httpx.Response, load: LoadConfig) -> list[ModelPayload]:
    """Return the models of an answer of /v1/models; none if the server has no such route.

    Args:
        response: The answer.
        load: The configuration of the clients.

    Raises:
        ValueError: The answer is not that of an images API.
    """
    variable = DIALECTS[load.dialect].key
    if response.status_code in (401, 403):
        state = "the key in it" if variable in os.environ else "no key: it is not set"
        raise ValueError(
            f"load.url={load.url} answers HTTP {response.status_code} to {variable}, {state}; set the right one"
        )
    try:
        if response.is_success:
            return msgspec.json.decode(response.content, type=ModelsPayload).data
        msgspec.json.decode(response.content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"load.url={load.url} answers {MODELS_ROUTE} with {describe_body(response)}; it is no server of an images "
            "API: give the root of one"
        ) from error
    if response.status_code != 404:
        refusal = read_refusal(response, own_kinds=False)
        raise ValueError(
            f"load.url={load.url} answers {MODELS_ROUTE} with HTTP {response.status_code}: {refusal.message}"
        )
    return []


def choose_model(load: LoadConfig, models: Sequence[ModelPayload]) -> str | None:
    """Return the model that requests name; None if they name none.

    Args:
        load: The configuration of the clients.
        models: The server's models.

    Raises:
        ValueError: load.model is not one of them, or has to choose one.
    """
    names = [model.id for model in models]
    listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    if load.model is not None:
        if names and load.model not in names:
            raise ValueError(f"load.model={load.model} is not a model of {load.url}; it has {listed}")
        return load.model
    if load.dialect is Dialect.triptych:
        return None
    if len(names) > 1:
        raise ValueError(f"{load.url} has several models; give load.model, one of {listed}")
    if not names and load.dialect is Dialect.openai:
        raise ValueError(f"{load.url} does not say which models it has; give load.model")
    return names[0] if names else None


def sent_config(config: RunConfig, fields: Sequence[str]) -> dict[str, Any]:
    """Return the part of a configuration that had an effect: what was sent, when, and the user's own keys.

    Args:
        config: The configuration.
        fields: Fields of `request` that were sent.
    """
    declared = to_dict(config)
    kept = {key: declared[key] for key in GROUPS}
    request = {key: declared["request"][key] for key in fields}
    return {**kept, "request": request, "serve": {"timeout_s": declared["serve"]["timeout_s"]}}


def external_record(run: ResolvedRun, wire: Wire, beginning: Beginning) -> Record:
    """Return the record of a load on a server that the run did not start, before anything is measured.

    Args:
        run: The run.
        wire: How requests were written.
        beginning: What was noted before the run.
    """
    template = ForeignRequest.of(run.config.request)
    names = ("steps", "guidance", "negative_prompt", "seed", "height", "width")
    readable = ("height", "width", *DIALECTS[wire.dialect].names)
    sent = [name for name in names if name in readable and getattr(template, name) is not None]
    prompts = ["prompts"] if run.config.dataset.file is None else []
    config = sent_config(run.config, [*prompts, "samples_per_prompt", *sent])
    note = "the server is not this project's: machine, versions and environment in the record are those of the client"
    info = EngineInfo("ready", 0, [], device=EXTERNAL, threads=0)
    record = base_record(
        replace(run, notes=[*run.notes, note]), info, dict(os.environ), FirstCall(0.0, 0.0, []), beginning
    )
    return msgspec.structs.replace(
        record,
        config=config,
        provenance=msgspec.structs.replace(record.provenance, timing=TIMING, cpu=None),
        attention=AttentionRow(EXTERNAL, EXTERNAL),
        engine=EngineRow(EXTERNAL, ""),
    )
