"""A data set in a configuration: where it has an effect, what goes with it, and what is refused before a run."""

from pathlib import Path

import pytest

from harness.config.bounds import MAX_IMAGES, MAX_SEED
from harness.config.yaml import from_yaml, to_yaml
from harness.messages import GenerationRequest
from harness.resolve.compose import ConfigError, ResolvedRun, compose_run
from harness.resolve.limits import check_request
from harness.serving.parts import part
from harness.serving.policy import TrackedRequest


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "rocket", "category": "vehicle"}\n'
        '{"prompt": "red apple", "category": "fruit"}\n'
        '{"prompt": "pizza", "category": "food"}\n'
    )
    return file


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_run(overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_the_short_key_and_the_group_are_the_same(prompts: Path) -> None:
    short, group = compose_run([f"request.prompts_file={prompts}"]), compose_run([f"dataset.file={prompts}"])
    assert short.config == group.config
    assert short.config.dataset.format == "jsonl"
    assert short.config.dataset.sha256 is not None
    assert from_yaml(to_yaml(short.config)) == short.config
    assert short.dataset is not None
    assert [prompt.prompt for prompt in short.dataset.prompts] == ["rocket", "red apple", "pizza"]
    assert compose_run(["request.prompt=rocket"]).dataset is None


def test_a_changed_file_is_another_configuration(prompts: Path) -> None:
    before = compose_run([f"dataset.file={prompts}"]).config
    prompts.write_text(prompts.read_text() + '{"prompt": "cat"}\n')
    after = compose_run([f"dataset.file={prompts}"]).config
    assert before.dataset.sha256 != after.dataset.sha256
    assert f"dataset.sha256 is {before.dataset.sha256}" in refused(
        f"dataset.file={prompts}", f"dataset.sha256='{before.dataset.sha256}'"
    )


@pytest.mark.parametrize("task", [["task=bench"], ["task=compare", "compare.a=[]", "compare.b=[]"]])
def test_other_tasks_take_the_prompts_into_their_request(prompts: Path, task: list[str]) -> None:
    run = compose_run([f"request.prompts_file={prompts}", "dataset.limit=2", *task])
    assert run.config.request.prompts == ["rocket", "red apple"]
    assert run.dataset is None, "one request, as without a data set"


def jobs(file: Path, shards: int) -> list[ResolvedRun]:
    return [compose_run([f"dataset.file={file}", f"dataset.shards={shards}", f"dataset.shard={k}"]) for k in range(3)]


def test_shards_differ_in_their_number_alone(prompts: Path) -> None:
    runs = jobs(prompts, 3)
    assert [[p.prompt for p in run.dataset.prompts] for run in runs if run.dataset] == [
        ["rocket"],
        ["red apple"],
        ["pizza"],
    ]
    for run in runs:
        run.config.dataset.shard = 0
    assert runs[0].config == runs[1].config == runs[2].config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["dataset.file=FILE", "request.prompts_file=FILE"], "not both: they are the same"),
        (["dataset.file=FILE", "request.prompt=cat"], "drop request.prompt and request.prompts"),
        (["dataset.file=FILE", "task=serve"], "generate or bench or compare or load only"),
        (["dataset.file=FILE", "task.fidelity=true"], "use task=bench with dataset.limit=16"),
        (["dataset.file=FILE", "task.profile=true"], "use task=bench with dataset.limit=16"),
        (["dataset.file=FILE", f"request.seed={MAX_SEED - 1}", "request.samples_per_prompt=2"], "would have seed"),
        (["dataset.file=FILE", "dataset.shards=9"], None),
        (["dataset.file=FILE", "dataset.shards=9", "dataset.shard=8"], "give dataset.shards=3 or fewer"),
        (["dataset.file=FILE", "dataset.format=drawbench"], "has no column 'prompts'"),
        (["dataset.limit=2"], "add dataset.file=PATH"),
        (["dataset=geneval"], "dataset=geneval needs its file"),
        (["dataset=partiprompts"], "did you mean parti_prompts?"),
        (["dataset.fiel=a"], "did you mean dataset.file?"),
        (["request.prompts_file=/no/such.txt"], "cannot be read (No such file or directory)"),
        (["request.prompts_file=/"], "say what it is"),
    ],
)
def test_what_does_not_go_together(prompts: Path, overrides: list[str], expected: str | None) -> None:
    given = [override.replace("FILE", str(prompts)) for override in overrides]
    if expected is None:
        compose_run(given)
        return
    assert expected in refused(*given)


@pytest.mark.parametrize(
    ("line", "task", "expected"),
    [
        ('{"prompt": "b", "size": "33x64"}', "task=generate", "line 2: width=33 is not a multiple of 8 pixels"),
        ('{"prompt": "b", "height": 65536}', "task=generate", "line 2: "),
        ('{"prompt": "b", "seed": 4}', "task=bench", "line 2 has a seed, size or negative prompt of its own"),
        ('{"prompt": "%s"}' % ("b" * 8001), "task=generate", "line 2: a prompt of 8001 characters"),
    ],
)
def test_a_line_that_the_model_cannot_make_is_named(tmp_path: Path, line: str, task: str, expected: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    assert expected in refused(f"request.prompts_file={file}", task)


def test_one_request_takes_a_bounded_number_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n".join(f"prompt {k}" for k in range(MAX_IMAGES + 1)))
    assert f"add dataset.limit={MAX_IMAGES}" in refused(f"request.prompts_file={file}", "task=bench")
    assert compose_run([f"request.prompts_file={file}"]).dataset is not None


def test_every_prompt_of_a_class_conditional_model_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("1\n2\nno such class\n")
    assert "prompt 'no such class' is not a class" in refused(
        f"request.prompts_file={file}", "model=dit_256", "model.load=dummy"
    )


def request(**values: object) -> GenerationRequest:
    return GenerationRequest("a", ["b", "c"], 2, 1.0, 32, 32, **values)  # type: ignore[arg-type]


def test_each_prompt_of_a_request_may_have_a_seed() -> None:
    plain, own = request(seed=5, samples_per_prompt=2), request(samples_per_prompt=2, seeds=[40, 7])
    assert [plain.seed_of(index) for index in range(4)] == [5, 6, 7, 8]
    assert [own.seed_of(index) for index in range(4)] == [40, 41, 7, 8]
    parts = [part(TrackedRequest(b"", own, 0.0, 1.0), index) for index in range(4)]
    assert [each.spec.seed for each in parts] == [40, 41, 7, 8], "an image alone in a step batch has the same seed"


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3], [1, -1], [1, MAX_SEED + 1]])
def test_seeds_that_do_not_fit_the_prompts_are_refused(seeds: list[int]) -> None:
    check_request(request(seeds=[1, 2]))
    with pytest.raises(ValueError, match="give one from 0 to"):
        check_request(request(seeds=seeds))
