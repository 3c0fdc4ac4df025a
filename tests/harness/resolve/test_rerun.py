"""from=FOLDER: the overrides of a recorded run, those given beside it, and what differs from the record."""

from pathlib import Path

import msgspec
import pytest

from harness.client import DiffusionGenerator
from harness.config.yaml import to_dict
from harness.records.record import Record, RunFolder, Status
from harness.records.rerun import compare_records, describe_rerun, with_rerun
from harness.resolve.command import parse_command
from harness.resolve.compose import ConfigError, compose_run
from tests.fixtures.own import OWN
from tests.fixtures.records import record


def recorded(folder: Path, *overrides: str, search_path: tuple[str, ...] = ()) -> Record:
    """Write the record of a run with these overrides."""
    config = {key: value for key, value in to_dict(compose_run([]).config).items() if key != "hardware"}
    made = msgspec.structs.replace(
        record(), overrides=list(overrides), config=config, search_path=list(search_path), primary="config"
    )
    run = RunFolder.claim(folder)
    run.write_record(made)
    run.finish(Status("ok"))
    return made


def test_overrides_of_the_record_come_first_and_the_commands_have_the_last_word(tmp_path: Path) -> None:
    folder = tmp_path / "scheduler=ddpm,request.steps=3"  # as a sweep names it
    recorded(folder, "scheduler=ddpm", "request.steps=3", "request.prompt=cat", "hydra.run.dir=x", "hydra.mode=RUN")
    command = parse_command([f"from={folder}", "request.steps=5", "request.prompts=[a,b]"])
    config = compose_run(command.overrides, command.search).config
    assert (config.scheduler.family, config.request.steps, config.request.prompts) == ("ddpm", 5, ["a", "b"])
    assert config.rerun_of == str(folder)
    assert not [override for override in command.overrides if override.startswith("hydra.")]


def test_a_run_with_configurations_of_its_own_finds_them_again(tmp_path: Path) -> None:
    recorded(tmp_path, "experiment=mine", search_path=(str(OWN),))
    generator = DiffusionGenerator.from_record(tmp_path, "request.steps=7")
    generator.stop()
    assert (generator.config.meta, generator.config.request.steps) == ({"owner": "me"}, 7)


def test_a_run_whose_configurations_are_gone_says_so(tmp_path: Path) -> None:
    recorded(tmp_path, "experiment=mine", search_path=("/no/such/folder",))
    with pytest.raises(ConfigError, match="came from /no/such/folder, which does not exist; add --config-dir DIR"):
        parse_command([f"from={tmp_path}"])
    assert parse_command([f"from={tmp_path}", "--config-dir", str(OWN)]).search.folders == (str(OWN),)


def test_a_folder_without_a_record_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        with pytest.raises(ConfigError) as caught:
            parse_command(arguments)
        return str(caught.value)

    assert "no such folder" in said("from=runs/no/where")
    recorded(tmp_path / "day/one")
    assert f"there are 1 in it, such as {tmp_path / 'day/one'}" in said(f"from={tmp_path / 'day'}")
    RunFolder.claim(tmp_path / "failed").finish(Status("failed", "out of luck"))
    assert "left no record (failed: out of luck)" in said(f"from={tmp_path / 'failed'}")
    assert "names one run, not 2" in said(f"from={tmp_path}", f"from={tmp_path}")
    with pytest.raises(ConfigError, match="no record there"):
        compose_run([f"rerun_of={tmp_path}"])


def test_what_differs_from_the_record_is_named(tmp_path: Path) -> None:
    earlier = recorded(tmp_path)
    config = earlier.config | {"request": earlier.config["request"] | {"steps": 7}, "notes": "of mine"}
    packages = earlier.provenance.packages | {"torch": "1.0"}
    code = msgspec.structs.replace(earlier.provenance, sources_sha256="other", packages=packages)
    image = msgspec.structs.replace(earlier.samples[0], sha256="cd")
    changed = msgspec.structs.replace(earlier, config=config, provenance=code, samples=[image])
    row = compare_records(str(tmp_path), earlier, changed)
    assert row.changed == ["request.steps: 20 -> 7"]
    assert (row.same_code, row.same_machine, row.images, row.equal_images) == (False, True, 1, 0)
    assert row.packages == [f"torch: {earlier.provenance.packages['torch']} -> 1.0"]
    same = with_rerun(earlier, str(tmp_path)).rerun
    assert same is not None
    assert (same.changed, same.same_code, same.packages, same.equal_images) == ([], True, [], 1)
    assert [line.split()[-1] for line in describe_rerun(same)] == ["equal", "same", "hashes"]


def test_a_record_that_is_gone_is_a_note(tmp_path: Path) -> None:
    found = with_rerun(record(), str(tmp_path))
    assert found.rerun is None
    assert found.notes[-1].endswith("nothing is compared with it")
