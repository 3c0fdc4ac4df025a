"""The answers of a server: its images, each decoded and measured, or what came in their place, in one line."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import msgspec
from PIL import Image, UnidentifiedImageError

from harness.tasks.load.arrivals import LoadRequest

SHOWN = 80  # characters of an answer in a message
KINDS = {408: "expired", 429: "busy", 503: "busy", 504: "expired"}
DATA_URL = "data:"


class AnswerError(ValueError):
    """An answer that is not what was requested; one line says what it is."""


class TimingPayload(msgspec.Struct):
    """The field that is read from the object `triptych` of an answer."""

    queued_ms: float = 0.0


class ImagePayload(msgspec.Struct):
    """One image of an answer."""

    b64_json: str | None = None
    url: str | None = None


class ImagesPayload(msgspec.Struct):
    """The fields that are read from an answer with images."""

    data: list[ImagePayload]
    triptych: TimingPayload | None = None


@dataclass(frozen=True)
class Refusal:
    """An answer without images.

    Attributes:
        kind: The outcome, such as busy.
        message: The server's own message.
    """

    kind: str
    message: str


def describe_body(response: httpx.Response) -> str:
    """Return the type and the beginning of an answer that is not JSON, in words."""
    kind = response.headers.get("content-type", "no content type").partition(";")[0]
    return f"{kind} that begins {' '.join(response.text.split())[:SHOWN]!r}"


def read_refusal(response: httpx.Response, own_kinds: bool) -> Refusal:
    """Return what an answer of another status than 2xx says; every server writes its errors in its own way.

    Args:
        response: The answer.
        own_kinds: Whether the `code` of its error is a kind of this project.
    """
    kind = KINDS.get(response.status_code, "rejected" if 400 <= response.status_code < 500 else "failed")
    where = f"HTTP {response.status_code}"
    try:
        payload = msgspec.json.decode(response.content)
    except msgspec.DecodeError:
        return Refusal(kind, f"{where}: {describe_body(response)}")
    error = payload.get("error", payload.get("detail", payload)) if isinstance(payload, dict) else payload
    if not isinstance(error, dict):
        return Refusal(kind, f"{where}: {error}"[: 4 * SHOWN])
    code, message = error.get("code"), error.get("message")
    own = code if own_kinds and isinstance(code, str) and code else kind
    return Refusal(own, str(message or f"{where}: {error}")[: 4 * SHOWN])


def read_images(response: httpx.Response) -> ImagesPayload:
    """Return the images of an answer, not decoded yet.

    Args:
        response: The answer, of status 2xx.

    Raises:
        AnswerError: It has no images.
    """
    try:
        return msgspec.json.decode(response.content, type=ImagesPayload)
    except msgspec.ValidationError as error:
        raise AnswerError(f"the answer is not one of an images API: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise AnswerError(f"the answer is {describe_body(response)}, not JSON; is load.url a server's root?") from error


async def fetch_bytes(client: httpx.AsyncClient, response: httpx.Response, images: ImagesPayload) -> list[bytes]:
    """Return the files of an answer's images; those behind a URL are fetched, from the measured server alone.

    Args:
        client: The HTTP client.
        response: The answer.
        images: The images of the answer.

    Raises:
        AnswerError: An image is missing, or is somewhere else.
    """
    found = []
    for index, image in enumerate(images.data):
        if image.b64_json is not None:
            found.append(decode_base64(image.b64_json, index))
        elif image.url is not None and image.url.startswith(DATA_URL):
            found.append(decode_base64(image.url, index))
        elif image.url is not None:
            found.append(await fetch_url(client, response, image.url, index))
        else:
            raise AnswerError(f"image {index} has neither b64_json nor url")
    return found


def decode_base64(text: str, index: int) -> bytes:
    """Return the bytes of base64, with or without the beginning of a data URL.

    Args:
        text: The base64.
        index: The number of the image, for the message.

    Raises:
        AnswerError: It is no base64.
    """
    content = text.partition(",")[2] if text.startswith(DATA_URL) else text
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise AnswerError(f"image {index} is not base64 ({error})") from error


async def fetch_url(client: httpx.AsyncClient, response: httpx.Response, url: str, index: int) -> bytes:
    """Return the file behind a URL of the measured server.

    Args:
        client: The HTTP client.
        response: The answer that has the URL, which may be relative to it.
        url: The URL.
        index: The number of the image, for the message.

    Raises:
        AnswerError: The URL is another server's, or there is no file.
    """
    try:
        place = response.url.join(url)
    except httpx.InvalidURL as error:
        raise AnswerError(f"image {index} has a url that is none ({error})") from error
    own = response.url
    if (place.scheme, place.host, place.port) != (own.scheme, own.host, own.port):
        raise AnswerError(f"image {index} is at {place.scheme}://{place.host}, and only the measured server is asked")
    found = await client.get(place)
    if not found.is_success:
        raise AnswerError(f"image {index} is not at its url: HTTP {found.status_code}")
    return found.content


def check_images(request: LoadRequest, files: Sequence[bytes]) -> str:
    """Decode every image of an answer and hold it to the request.

    Args:
        request: The request.
        files: The image files of its answer.

    Returns:
        Their size, such as `512x768`, width first.

    Raises:
        AnswerError: There are more or fewer images than requested, or one is broken or has another size.
    """
    if len(files) != request.samples_per_prompt:
        raise AnswerError(f"{len(files)} images came, and {request.samples_per_prompt} were requested")
    sizes = []
    for index, content in enumerate(files):
        sizes.append(decoded_size(content, index))
        wanted = None if request.width is None else f"{request.width}x{request.height}"
        if (wanted or sizes[0]) != sizes[-1]:
            raise AnswerError(
                f"image {index} is {sizes[-1]}, and {wanted or f'image 0 is {sizes[0]}'}"
                f"{' was requested' if wanted else ''}"
            )
    return sizes[0]


def decoded_size(content: bytes, index: int) -> str:
    """Return the size of an image, such as `512x768`, after decoding all of it.

    Args:
        content: The image file.
        index: The number of the image, for the message.

    Raises:
        AnswerError: It cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return f"{image.width}x{image.height}"
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise AnswerError(f"image {index} cannot be decoded ({' '.join(str(error).split())[:SHOWN]})") from error
