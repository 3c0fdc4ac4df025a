"""The defaults of the models agree with diffusers' own class, in each family that the weights were trained in."""

import pytest

from harness.resolve.compose import compose_run
from schedulers.published.peer import difference_from_diffusers

FLOW, DDIM = "FlowMatchEulerDiscreteScheduler", "DDIMScheduler"
DEFAULTS = [
    ("emoji", "rectified_flow", FLOW),
    ("emoji", "ddpm", DDIM),
    ("emoji", "sgm", "EDMDPMSolverMultistepScheduler"),
    ("flux_160m", "rectified_flow", FLOW),
    ("qwen_image", "rectified_flow", FLOW),
    ("sd3_445m", "rectified_flow", FLOW),
    ("z_image_110m", "rectified_flow", FLOW),
    ("dit_130m", "ddpm", DDIM),
    ("sd21", "ddpm", DDIM),
]


@pytest.mark.parametrize(("model", "family", "name"), DEFAULTS)
def test_defaults_agree_with_diffusers_own_class(model: str, family: str, name: str) -> None:
    weights = [] if model == "emoji" else ["model.load=dummy"]
    run = compose_run([f"model={model}", f"scheduler={family}", *weights])
    assert run.noise_scheduler is not None
    found = difference_from_diffusers(run.noise_scheduler, run.config.request.steps, tokens=1024)
    assert found is not None
    assert found.class_name == name
    assert found.rel_l2 < 1e-9, found
