"""The JSON objects and names that clients receive."""

from dataclasses import dataclass

import pytest

from harness.messages import GenerationRequest
from harness.tasks.serve.jobs import GenerationJob
from harness.tasks.serve.responses import file_name
from harness.tasks.serve.service import RequestHandle


@dataclass
class Case:
    """A prompt, the sample's index, and the name of its file."""

    prompt: str
    index: int
    name: str


@pytest.mark.parametrize(
    "case",
    [
        Case("Red apple, on a table", 0, "red-apple-on-a-table-seed7-steps8.png"),
        Case("red apple", 2, "red-apple-seed9-steps8.png"),
        Case("../../etc/passwd\r\n", 0, "etc-passwd-seed7-steps8.png"),
        Case("赤いりんご", 0, "赤いりんご-seed7-steps8.png"),
        Case("?!", 0, "image-seed7-steps8.png"),
        Case("word " * 20, 0, "word-word-word-word-word-word-word-word-seed7-steps8.png"),
    ],
)
def test_a_file_is_named_after_its_prompt_seed_and_steps(case: Case) -> None:
    request = GenerationRequest("a", [case.prompt], 8, 2.0, 64, 64, seed=7, samples_per_prompt=3)
    assert file_name(RequestHandle(GenerationJob(request), None), case.index, ".png") == case.name
