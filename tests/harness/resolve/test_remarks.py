"""The user's own keys: tags, notes and meta are recorded, and change neither an image nor what is done already."""

from pathlib import Path

import pytest

from harness import cli
from harness.config.yaml import from_yaml, to_dict, to_yaml
from harness.loggers.declared import own_tags
from harness.records.record import RunFolder, Status, fingerprint
from harness.resolve.compose import ConfigError, compose_run

REMARKS = ["tags=[baseline,2026]", "notes=the first try", "meta.owner=me", "+meta.deep={depth: [1, 2]}"]


def test_any_name_below_meta_is_the_users() -> None:
    config = compose_run(REMARKS).config
    assert config.meta == {"owner": "me", "deep": {"depth": [1, 2]}}
    assert (config.tags, config.notes) == (["baseline", "2026"], "the first try")
    assert from_yaml(to_yaml(config)) == config
    assert own_tags(to_dict(config)) == ["baseline", "2026"]


@pytest.mark.parametrize("override", ["meto.owner=me", "tags=one", f"tags=[{'a' * 65}]", 'tags=[""]', "meta=3"])
def test_a_wrong_remark_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        compose_run([override])


def test_remarks_change_no_fingerprint() -> None:
    with_remarks, without = (to_dict(compose_run(overrides).config) for overrides in (REMARKS, []))
    assert fingerprint(with_remarks) == fingerprint(without)
    assert with_remarks["meta"] != without["meta"]


def test_a_planned_job_is_not_planned_again_for_its_remarks(tmp_path: Path) -> None:
    run = RunFolder.claim(tmp_path)
    run.write_config(to_yaml(compose_run(["task=plan"]).config))
    run.finish(Status("ok"))
    assert cli.is_already_done(tmp_path, compose_run(["task=plan", *REMARKS]).config)
    assert not cli.is_already_done(tmp_path, compose_run(["task=plan", "plan.ranks=2"]).config)
