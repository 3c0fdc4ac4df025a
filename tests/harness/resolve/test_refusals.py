"""What a rank refused only after it had loaded, or ran as something else, is refused as the run is composed."""

import pytest

from harness.resolve.compose import ConfigError, compose_run

DDPM = ["scheduler=ddpm", "model.load=dummy"]
SGM = ["scheduler=sgm", "model.load=dummy"]
FLUX = ["model=flux", "scheduler=rectified_flow", "model.load=dummy"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model=sdxl", "model.text.tokens=78", "model.load=dummy"], "model.text.tokens=78; "),
        (["model=sd15", "model.text.tokens=100", "model.load=dummy"], "model.text.tokens=100; "),
        (["scheduler.state_dtype=bf16"], "scheduler.state_dtype=bf16 is not one of float32, float16, bfloat16; did"),
        (["scheduler.solver.kind=huen"], "scheduler.solver.kind=huen is not one of midpoint, heun; did you mean heun?"),
        (["scheduler.solver.b=bh9"], "scheduler.solver.b=bh9 is not one of bh1, bh2; did you mean bh"),
        (["scheduler.round_tau=up"], "scheduler.round_tau=up is not one of round, floor"),
        (["scheduler.shift=0"], "scheduler.shift=0.0; give 0.001 to 1000"),
        (["scheduler.shift_terminal=1"], "scheduler.shift_terminal=1.0; give 0.0001 to 0.99"),
        (["scheduler.clip=-1"], "scheduler.clip=-1.0; give at least 0.001"),
        (["scheduler.threshold=2"], "scheduler.threshold=2.0; give 0 to 1"),
        (["scheduler.mu=1000"], "scheduler.mu=1000.0; give -7 to 7"),
        (["scheduler.solver.s_noise=nan"], "scheduler.solver.s_noise=nan; give a finite number, 0 to 10"),
        (["scheduler.solver.eta=5"], "scheduler.solver.eta=5.0; give 0 to 1"),
        (["scheduler.solver.rtol=0"], "scheduler.solver.rtol=0.0; give 1e-05 to 1"),
        (["request.guidance=1e30"], "request.guidance=1e+30; give 0 to 1000"),
        (["request.seed=1000000000000000000000"], "request.seed=1000000000000000000000; give 0 to 92233"),
        (["launch.start_timeout_s=1e30"], "launch.start_timeout_s=1e+30; give 0 to 604800 s"),
        (["serve.port=70000"], "serve.port=70000; give 0 to 65535"),
        (["model.text.cache_mib=-1"], "model.text.cache_mib=-1.0; give at least 0 MiB"),
        (["scheduler.sigma_first=0.5", "scheduler.sigma_last=0.7"], "sigma_last=0.7 is not below sigma_first=0.5"),
        (["scheduler.spacing=custom", "scheduler.sigmas=[0.1,0.9]", "request.steps=2"], "sigmas=[0.1, 0.9] do not"),
        ([*DDPM, "scheduler.spacing=lcm", "scheduler.original_steps=2000"], "original_steps=2000 of a path of 1000"),
        ([*DDPM, "scheduler/solver=unipc", "scheduler.solver.order=4"], "order=4, but solver=unipc has orders 1 to 3"),
        ([*SGM, "scheduler.sigma_min=100"], "sigma_min=100 is not below sigma_max=80"),
        (
            [*DDPM, "scheduler.learned_variance=true"],
            "scheduler.learned_variance=true, but the network of model=emoji outputs none; set",
        ),
        (
            ["engine=diffusers", "scheduler.state_dtype=bfloat16"],
            "scheduler.state_dtype=bfloat16 has no effect in diffusers' pipelines; drop it, or use engine=native",
        ),
        (
            [*FLUX, "engine=diffusers", "scheduler.sigma_first=0.9"],
            "diffusers' pipeline of model=flux scales neither noise nor network input",
        ),
        (
            [*FLUX, "scheduler.max_shift=7", "scheduler.max_tokens=2000"],
            "base_shift=0.5 and max_shift=7 give mu=",
        ),
        (["model=dit_256", "model.load=dummy", "request.prompt=goldfsh"], "prompt 'goldfsh' is not a class"),
        (["model=ddpm_cifar10", "model.load=dummy", "request.prompt=cat"], "this model takes no prompt, but got 'cat'"),
        (["model=ddpm_cifar10", "model.load=dummy", "request.guidance=3"], "request.guidance=3.0, but this model has"),
        (["task=train", "train.denoiser.heads=7"], "train.denoiser.width=256 is not a multiple of"),
        (["task=train", "scheduler=ddpm", "train.score.steps=2000"], "train.score.steps=2000: steps=2000 with"),
    ],
)  # fmt: skip
def test_it_is_refused_in_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as caught:
        compose_run(overrides)
    assert str(caught.value).startswith(line)


def test_a_learned_variance_runs_on_a_network_that_has_one() -> None:
    run = compose_run(["model=dit_130m", "model.load=dummy", "scheduler=ddpm"])
    assert run.config.scheduler.learned_variance
