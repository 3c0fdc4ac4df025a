"""Forms: what they stand for, what is none, and that no Content-Type takes the event loop's time."""

import json
import time

import httpx
import pytest

from harness.tasks.serve.multipart import MAX_FIELDS, form_to_json, multipart_boundary
from harness.tasks.serve.problem import Problem


def form_of(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + end


def test_a_form_as_httpx_sends_it_is_its_object() -> None:
    fields = {"prompt": 'Ä "fox"\r\n--b', "triptych[seed]": "3", "triptych[steps]": "4", "size": ""}
    sent = httpx.Request("POST", "http://x", files={name: (None, value) for name, value in fields.items()})
    boundary = multipart_boundary(sent.headers["content-type"])
    assert boundary
    assert json.loads(form_to_json(sent.read(), boundary)) == {
        "prompt": 'Ä "fox"\r\n--b',
        "triptych": {"seed": "3", "steps": "4"},
        "size": "",
    }


@pytest.mark.parametrize(
    ("kind", "boundary"),
    [
        ("application/json", None),
        ("", None),
        ("multipart/mixed; boundary=b", None),
        ("Multipart/Form-Data; Boundary=b", b"b"),
        ('multipart/form-data; boundary="b c"', b"b c"),
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary*=undefined''x", b""),
        ("multipart/form-data; boundary*0=undefined''x", b""),
    ],
)
def test_the_boundary_of_a_content_type(kind: str, boundary: bytes | None) -> None:
    assert multipart_boundary(kind) == boundary


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no last boundary"),
        (b"x", "not a form"),
        (form_of(b'name="prompt"\r\n\r\nx', end=b""), "no last boundary"),
        (form_of(b'name="prompt"\r\n\r\nx')[:-9], "no last boundary"),
        (form_of(b"\r\n\r\nx"), "not a form"),
        (form_of(b"name*=undefined''x\r\n\r\nx"), "not a form"),
        (form_of(b'name="prompt"; filename="a.png"\r\n\r\nx'), "prompt is a file, and files are not read"),
        (form_of(b'name="prompt"\r\n\r\n\xff'), "prompt is not UTF-8"),
        (form_of(b'name="a b"\r\n\r\nx'), "a b: there is no such field"),
        (form_of(b'name="a[b][c]"\r\n\r\nx'), "there is no such field"),
        (form_of(b'name="\xff"\r\n\r\nx'), "there is no such field"),
        (form_of(*[b'name="prompt"\r\n\r\nx'] * 2), "prompt is given twice"),
        (form_of(b'name="triptych"\r\n\r\nx', b'name="triptych[seed]"\r\n\r\n1'), "is given twice"),
        (form_of(b'name="triptych[seed]"\r\n\r\n1', b'name="triptych"\r\n\r\nx'), "is given twice"),
        (form_of(*(b'name="a%d"\r\n\r\nx' % k for k in range(MAX_FIELDS + 2))), "there is no such field"),
        (form_of(b'name="prompt"\r\ncontent-transfer-encoding: rot13\r\n\r\nx'), "not a form"),
        (form_of(b'name="prompt"\r\ncontent-transfer-encoding: base64\r\n\r\n!'), "not a form"),
        (form_of(b'name="prompt"\r\n' + b"x: y\r\n" * 100 + b"\r\nx"), "not a form"),
    ],
)
def test_what_is_no_form_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(Problem, match=words) as raised:
        form_to_json(body, b"b")
    assert raised.value.code == "rejected"


def test_a_long_boundary_is_refused() -> None:
    with pytest.raises(Problem, match="exceeds maximum of 256"):
        form_to_json(b"x", b"b" * 300)


def test_a_long_content_type_takes_the_time_of_its_length() -> None:
    """The time grows with the length, not with its square: eight times the length, far less than 64 times the time."""

    def seconds(parameters: int) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            multipart_boundary("multipart/form-data" + "; a*0=b" * parameters)
            times.append(time.perf_counter() - began)
        return min(times)

    assert seconds(8_000) < 32 * seconds(1_000)
