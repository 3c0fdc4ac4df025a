"""A request in the API of each server: which fields it reads, where they stand, and within which bounds.

| dialect | read in |
|---|---|
| triptych | harness/tasks/serve/openai.py |
| openai | platform.openai.com/docs/api-reference/images/create |
| sglang | sgl-project/sglang, python/sglang/multimodal_gen/runtime/entrypoints/openai/protocol.py and image_api.py |
| vllm_omni | vllm-project/vllm-omni, vllm_omni/entrypoints/openai/protocol/images.py |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import msgspec

from harness.config.load import Dialect
from harness.config.schema import RunConfig
from harness.datasets.trace import TracedRequest
from harness.tasks.load.arrivals import ForeignRequest, LoadRequest, own_prompts, traced_requests

ROUTE = "/v1/images/generations"
ALWAYS_BASE64 = ("gpt-image", "chatgpt-image")  # models that take no response_format
DIFFUSION = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "seed": "seed",
    "negative_prompt": "negative_prompt",
}
OWN = {name: name for name in ("steps", "guidance", "seed", "negative_prompt", "timeout_s")}


@dataclass(frozen=True)
class DialectRow:
    """The API of one server.

    Attributes:
        names: Names of the fields that it has besides OpenAI's, by those of a request here.
        inside: Object that holds them; None if they stand beside OpenAI's fields.
        bounds: Smallest and largest value that it takes, by the name in a request here.
        key: Environment variable with the key that is sent to it.
        owner: Beginning of `owned_by` in the answer of its /v1/models; None if others answer in this dialect too.
    """

    names: Mapping[str, str]
    inside: str | None = None
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))
    key: str = "OPENAI_API_KEY"
    owner: str | None = None


DIALECTS = {
    Dialect.triptych: DialectRow(OWN, inside="triptych", key="TRIPTYCH_API_KEY", owner="triptych"),
    Dialect.openai: DialectRow({}, bounds={"samples_per_prompt": (1, 10)}),
    # it generates 10 images at most, whatever n is
    Dialect.sglang: DialectRow(DIFFUSION, bounds={"samples_per_prompt": (1, 10)}, owner="sglang"),
    Dialect.vllm_omni: DialectRow(
        DIFFUSION, bounds={"samples_per_prompt": (1, 10), "steps": (1, 200), "guidance": (0, 20)}, owner="vllm"
    ),
}


@dataclass(frozen=True)
class Wire:
    """How requests are written: the dialect, the model that they name, and further fields.

    Attributes:
        dialect: The dialect.
        model: Name of the model; None names none.
        extra: Further fields.
    """

    dialect: Dialect = Dialect.triptych
    model: str | None = None
    extra: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def body(self, request: LoadRequest) -> dict[str, object]:
        """Return a request as a JSON body; what the request leaves open is not in it.

        Args:
            request: The request.
        """
        row = DIALECTS[self.dialect]
        given = {name: getattr(request, key) for key, name in row.names.items() if getattr(request, key) is not None}
        body: dict[str, object] = {"prompt": request.prompts[0], "n": request.samples_per_prompt}
        if self.model is not None:
            body["model"] = self.model
        if request.height is not None and request.width is not None:
            body["size"] = f"{request.width}x{request.height}"
        if not (self.model or "").startswith(ALWAYS_BASE64):
            body["response_format"] = "b64_json"
        own = given if row.inside is None else {row.inside: given} if given else {}
        return {**body, **own, **self.extra}


def check_foreign(config: RunConfig) -> None:
    """Refuse what the server at load.url would ignore or change without a word.

    Args:
        config: The configuration, with a URL; its request was not resolved against a model.

    Raises:
        ValueError: One line says what to change.
    """
    load, request = config.load, config.request
    row, traced = DIALECTS[load.dialect], traced_requests(load)
    if not request.prompts and (not traced or any(each.prompt is None for each in traced)):
        raise ValueError("load.url names a server whose model is not known here; add request.prompt, or dataset.file")
    if request.frames not in (None, 1):
        raise ValueError(f"request.frames={request.frames}; load.url is measured with images: drop request.frames")
    if (request.height is None) != (request.width is None):
        raise ValueError("give both request.height and request.width, or neither for the server's own size")
    template = ForeignRequest.of(request)
    check_fields("request.", msgspec.structs.replace(template, seed=template.seed or None), load.dialect)
    for steps in load.steps:
        check_fields("load.", ForeignRequest("", [], steps=steps), load.dialect)
    for file, each in [(f"load.trace={load.trace}", each) for each in traced] + dataset_rows(config):
        own = ForeignRequest("", [], steps=each.steps, negative_prompt=each.negative_prompt, seed=each.seed)
        check_fields(f"{file}: line {each.line}: ", own, load.dialect)
    taken = {"prompt", "n", "model", "size", "response_format"} | (
        {row.inside} if row.inside else {*row.names.values()}
    )
    if twice := sorted(taken & set(map(str, load.extra_body))):
        raise ValueError(f"load.extra_body has {twice[0]}, which has a key of its own in request or load; use that")


def dataset_rows(config: RunConfig) -> list[tuple[str, TracedRequest]]:
    """Return what a data set says of each request, with the name of its file; none without a data set.

    Args:
        config: The configuration.
    """
    if config.dataset.file is None:
        return []
    return [(f"dataset.file={config.dataset.file}", each) for each in own_prompts(config)]


def check_fields(place: str, request: ForeignRequest, dialect: Dialect) -> None:
    """Refuse fields that a dialect does not have, and values beyond its bounds.

    Args:
        place: What stands before the name of a field in the message, such as `request.`.
        request: A request with the fields that are given.
        dialect: The dialect.

    Raises:
        ValueError: One line says what to change.
    """
    row = DIALECTS[dialect]
    for name in ("steps", "guidance", "negative_prompt", "seed", "samples_per_prompt"):
        value = getattr(request, name)
        if value is None:
            continue
        if name not in row.names and name != "samples_per_prompt":
            fitting = " or ".join(each.name for each, other in DIALECTS.items() if name in other.names)
            raise ValueError(
                f"{place}{name}={value} is not in the API of load.dialect={dialect.name}; drop it, or use {fitting}"
            )
        if name in row.bounds and not row.bounds[name][0] <= value <= row.bounds[name][1]:
            low, high = row.bounds[name]
            raise ValueError(f"{place}{name}={value}; load.dialect={dialect.name} takes {low} to {high}")
