"""The adapter to diffusers' interface gives what our loop gives, and real pipelines generate the same image with it."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from schedulers.build import build
from schedulers.compatibility import NoiseSchedulerSettings
from schedulers.diffusers_adapter import DiffusersAdapter, StepOutput
from schedulers.grid import Point
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.prediction import Estimate
from schedulers.published import from_diffusers
from schedulers.solvers.rk45 import RK45
from schedulers.solvers.sde import EDMChurn
from tests.fixtures.schedulers.parity import SHAPE, Case, Toy, module_of, ours, sample_noise
from tests.fixtures.schedulers.published_cases import CASES, FLOW, SD

diffusers.utils.logging.set_verbosity_error()
EMOJI = Path(__file__).parents[2] / "models" / "reference" / "emoji"
STEPS = 5


def push(view: DiffusersAdapter, x: Tensor, network: Toy, **step: Any) -> Tensor:
    """Run the loop of a pipeline."""
    for t in view.timesteps:
        x = view.step(network(view.scale_model_input(x, t), t.item()), t, x, **step).prev_sample  # type: ignore[union-attr]
    return x


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pushing_is_pulling(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every published sampler: the same evaluations, noise and result, with noise keyed alike."""
    pulled = Toy(case.options.get("variance_type", ""))
    wanted, grid = ours(case, STEPS, pulled)
    view, pushed = DiffusersAdapter(case.ours()), Toy(pulled.variance)
    view.set_timesteps(STEPS, **case.set_timesteps)
    monkeypatch.setattr(view, "_noise_for", lambda key, generator: sample_noise(key))
    got = push(view, sample_noise(-1) * view.init_noise_sigma, pushed)
    assert pushed.timesteps == pytest.approx(pulled.timesteps, rel=1e-6)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    torch.testing.assert_close(view.sigmas.double(), grid.sigma, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name", ["EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler"]
)
def test_a_generator_gives_the_noise_of_diffusers(name: str) -> None:
    options = {"clip_sample": False} if name == "DDPMScheduler" else {}
    theirs, network, x = getattr(module_of(name), name)(**options), Toy(), sample_noise(-1)
    theirs.set_timesteps(STEPS)
    generator, wanted = torch.Generator().manual_seed(3), x
    for t in theirs.timesteps:
        fed = theirs.scale_model_input(wanted, t)
        wanted = theirs.step(network(fed, t.item()), t, wanted, generator=generator).prev_sample
    view = DiffusersAdapter(from_diffusers({"_class_name": name, **options}))
    view.set_timesteps(STEPS)
    got = push(view, x, network, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    several = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    view.set_timesteps(STEPS)
    both = push(view, x, network, generator=several)
    view.set_timesteps(STEPS)
    alone = push(view, x[1:], network, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def pixart() -> Any:
    pipeline = diffusers.PixArtSigmaPipeline.from_pretrained(EMOJI, dtype=torch.float32, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image(pixart: Any, scheduler: Any, **changes: Any) -> Tensor:
    """Generate one image with diffusers' own pipeline, pixels in [0, 1]."""
    pixart.scheduler = scheduler
    latent = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(11))
    requested = {"num_inference_steps": 6, "guidance_scale": 3.0, "negative_prompt": "blurry", "latents": latent}
    requested |= {
        "height": 64,
        "width": 64,
        "use_resolution_binning": False,
        "clean_caption": False,
        "output_type": "pt",
    }
    requested |= {"max_sequence_length": 24, "generator": torch.Generator().manual_seed(2)}
    return pixart("red apple, 3d", **(requested | changes)).images[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 2.0}),
        ("DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
        ("UniPCMultistepScheduler", {**FLOW, "solver_order": 3}),
    ],
)
def test_pixart_generates_the_same_image_with_the_adapter(pixart: Any, name: str, options: dict[str, Any]) -> None:
    theirs = image(pixart, getattr(diffusers, name)(**options))
    view = DiffusersAdapter(from_diffusers({"_class_name": name, **options}))
    assert theirs.std() > 0.05
    assert (image(pixart, view) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("solver", ["euler", "heun", "ddim"])
def test_pixart_with_the_adapter_generates_what_our_loop_generates(pixart: Any, solver: str) -> None:
    scheduler = build(
        NoiseSchedulerSettings("rectified_flow", solver=solver, eta=0.7 if solver == "ddim" else None, shift=2.0)
    )
    generated = image(pixart, DiffusersAdapter(scheduler))
    states = pixart.encode_prompt("red apple, 3d", True, "blurry", clean_caption=False, max_sequence_length=24)
    generator = torch.Generator().manual_seed(2)

    @torch.no_grad()
    def denoise(x: Tensor, point: Point) -> Estimate:
        outputs = [
            pixart.transformer(
                x,
                encoder_hidden_states=state,
                encoder_attention_mask=mask,
                timestep=torch.tensor([point.tau]),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0]
            for state, mask in (states[2:], states[:2])
        ]
        return scheduler.prediction.estimate(outputs[0] + 3.0 * (outputs[1] - outputs[0]), x, point)

    grid = scheduler.grid(6)
    latent = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(11))
    latent = scheduler.sample(
        scheduler.init_noise(latent, grid), grid, denoise, lambda i: torch.randn(latent.shape, generator=generator)
    )
    with torch.no_grad():
        pixels = pixart.vae.decode(latent / pixart.vae.config.scaling_factor, return_dict=False)[0]
    wanted = pixart.image_processor.postprocess(pixels, output_type="pt")[0]
    assert (generated - wanted).abs().max() < 1e-4


@pytest.fixture(scope="module")
def stable_diffusion() -> Any:
    """Return a pipeline with random weights and no text encoder: embeddings are inputs."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=4)
    pipeline = diffusers.StableDiffusionPipeline(
        vae, None, None, unet, diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), None, None, None, False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "name",
    ["HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "PNDMScheduler"],
)
def test_stable_diffusion_with_several_evaluations_a_step_and_with_noise(stable_diffusion: Any, name: str) -> None:
    options = {**SD, "timestep_spacing": "leading", "steps_offset": 1}
    options |= {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    view = DiffusersAdapter(from_diffusers({"_class_name": name, **options}))
    embedding = torch.randn((1, 4, 16), generator=torch.Generator().manual_seed(5))
    generated = []
    for scheduler in (getattr(diffusers, name)(**options), view):
        stable_diffusion.scheduler = scheduler
        generated.append(
            stable_diffusion(
                prompt_embeds=embedding,
                negative_prompt_embeds=-embedding,
                num_inference_steps=STEPS,
                generator=torch.Generator().manual_seed(6),
                output_type="latent",
            ).images
        )
    assert (generated[1] - generated[0]).abs().max() < 1e-4 * generated[0].abs().max()


def test_ddpm_pipeline() -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipeline, generated = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()), []
    pipeline.set_progress_bar_config(disable=True)
    for scheduler in (pipeline.scheduler, DiffusersAdapter(from_diffusers({"_class_name": "DDPMScheduler"}))):
        pipeline.scheduler = scheduler
        generator = torch.Generator().manual_seed(7)
        generated.append(pipeline(num_inference_steps=STEPS, generator=generator, output_type="np").images)
    assert abs(generated[1] - generated[0]).max() < 1e-4


def flow(**changes: Any) -> NoiseScheduler:
    return build(NoiseSchedulerSettings("rectified_flow", **changes))


def test_given_sigmas_and_mu_are_those_of_flux() -> None:
    options = {"use_dynamic_shifting": True}
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    theirs.set_timesteps(sigmas=[1.0, 0.7, 0.2], mu=0.9)
    view = DiffusersAdapter(from_diffusers({"_class_name": "FlowMatchEulerDiscreteScheduler", **options}))
    view.set_timesteps(sigmas=[1.0, 0.7, 0.2], mu=0.9)
    torch.testing.assert_close(view.sigmas, theirs.sigmas)
    torch.testing.assert_close(view.timesteps, theirs.timesteps)
    sized = DiffusersAdapter(view.scheduler, tokens=4096)
    sized.set_timesteps(4)
    theirs.set_timesteps(4, mu=1.15)
    torch.testing.assert_close(sized.sigmas, theirs.sigmas)


def test_the_state_stays_float32_inside_a_bfloat16_pipeline() -> None:
    """The result is far nearer to float32 than with a state rounded at every step, as diffusers' own is."""
    view = DiffusersAdapter(flow())
    results = []
    for rounded in (False, True):
        view.set_timesteps(50)
        x = torch.ones(SHAPE, dtype=torch.bfloat16)
        for t in view.timesteps:
            if rounded:
                x = x * 1.0000001 + 0
                view._requested_state = (
                    None if view._requested_state is None else view._requested_state + 1
                )  # no returned object is recognised
            x = view.step(torch.full_like(x, 0.123), t, x).prev_sample  # type: ignore[union-attr]
        results.append((x.float() - (1 - 0.123)).abs().max().item())
    assert results[0] < 4e-3 < results[1]


def test_add_noise_is_the_path_at_the_row() -> None:
    view = DiffusersAdapter(flow())
    view.set_timesteps(4)
    x0, noise = torch.ones(2, 1), torch.full((2, 1), 3.0)
    torch.testing.assert_close(view.add_noise(x0, noise, view.timesteps[[0, 2]]), torch.tensor([[3.0], [2.0]]))
    with pytest.raises(ValueError, match="timestep 300"):
        view.add_noise(x0, noise, torch.tensor([300, 500]))


def test_a_changed_state_is_taken_up_between_steps_and_refused_inside_one() -> None:
    view, x = DiffusersAdapter(flow(solver="heun")), torch.ones(1, 1)
    view.set_timesteps(2)
    first = view.step(torch.zeros(1, 1), view.timesteps[0], x)
    assert isinstance(first, StepOutput)
    with pytest.raises(ValueError, match="changed inside a step"):
        view.step(torch.zeros(1, 1), view.timesteps[1], first.prev_sample + 1)
    second, x0 = view.step(torch.zeros(1, 1), view.timesteps[1], first.prev_sample, return_dict=False)  # type: ignore[misc]
    assert x0.item() == second.item() == 1.0
    last = view.step(torch.zeros(1, 1), view.timesteps[2], second + 1, return_dict=False)[0]  # type: ignore[index]
    assert last.item() == 2.0


def test_what_the_view_cannot_honour_is_refused() -> None:
    view, x = DiffusersAdapter(flow()), torch.ones(1, 1)
    with pytest.raises(ValueError, match="call set_timesteps"):
        view.scale_model_input(x)
    with pytest.raises(ValueError, match="give one of them"):
        view.set_timesteps(3, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="mu is given"):
        view.set_timesteps(3, mu=0.5)
    with pytest.raises(ValueError, match="sigmas are given"):
        DiffusersAdapter(build(NoiseSchedulerSettings("sgm"))).set_timesteps(sigmas=[3.0, 1.0])
    view.set_timesteps(2)
    view.set_begin_index(0)
    with pytest.raises(ValueError, match="begin_index=1"):
        view.set_begin_index(1)
    with pytest.raises(ValueError, match="timestep 500 is out of order; the next evaluation is at 1000"):
        view.step(x, 500.0, x)
    for t in view.timesteps:
        x = view.step(x, t, x).prev_sample  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="finished"):
        view.step(x, 0.0, x)
    with pytest.raises(AttributeError, match="no shift_terminal"):
        _ = view.config.shift_terminal
    adaptive = NoiseScheduler(view.scheduler.path, view.scheduler.spacing, view.scheduler.prediction, RK45())
    with pytest.raises(ValueError, match="RK45 chooses its timesteps"):
        DiffusersAdapter(adaptive).set_timesteps(3)
    sgm = build(NoiseSchedulerSettings("sgm"))
    churned = NoiseScheduler(sgm.path, sgm.spacing, sgm.prediction, EDMChurn(s_tmax=100.0))
    with pytest.raises(ValueError, match="lower its s_tmax"):
        DiffusersAdapter(churned).set_timesteps(3)


def test_churn_moves_the_state_before_an_evaluation() -> None:
    """The pipeline gets the noised state at the noised timestep; the noise of a replayed step is made once."""
    sgm = build(NoiseSchedulerSettings("sgm"))
    scheduler = NoiseScheduler(sgm.path, sgm.spacing, sgm.prediction, EDMChurn())
    view, network = DiffusersAdapter(scheduler), Toy()
    view.set_timesteps(8)
    got = push(view, sample_noise(-1) * view.init_noise_sigma, network, generator=torch.Generator().manual_seed(9))
    grid, generator = scheduler.grid(8), torch.Generator().manual_seed(9)
    pulled = scheduler.sample(
        grid.init_std * sample_noise(-1),
        grid,
        lambda x, p: scheduler.prediction.estimate(network(p.c_in * x, p.tau), x, p),
        lambda i: torch.randn(SHAPE, generator=generator),
    )
    torch.testing.assert_close(got, pulled, rtol=1e-4, atol=1e-4)
