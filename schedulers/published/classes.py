"""Every supported scheduler class of diffusers, and the parts that it maps to."""

from collections.abc import Callable

from schedulers.conventions import InitStdOverride, RespacedLevels, RowsFromPath
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.paths import ContinuousVPPath, EDMPath, FlowPath, GeometricVEPath, NoisePath, VECoordinates
from schedulers.prediction import Eps, Flow, LearnedVariance, Score
from schedulers.published import common
from schedulers.published.multistep import deis, dpm, edm_dpm, edm_path_and_spacing, edm_prediction, unipc
from schedulers.published.options import Options
from schedulers.published.refusals import LEARNED
from schedulers.solvers.adams import LMS, PNDM
from schedulers.solvers.base import Solver
from schedulers.solvers.euler import DDIM, Euler
from schedulers.solvers.heun import DPM2, Heun
from schedulers.solvers.lcm import LCM, TCD
from schedulers.solvers.posterior import DDPM, Variance
from schedulers.solvers.sde import EulerMaruyama, PredictorCorrector
from schedulers.spacing import Distilled, FlowLinspace, Karras, Spacing, TimestepMap, UniformTime

Builder = Callable[[Options], NoiseScheduler]
VARIANCES: dict[str, Variance] = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "learned": "learned",
    "learned_range": "learned_range",
}


def _ddpm(o: Options) -> NoiseScheduler:
    kind = o.text("variance_type")
    prediction = common.prediction(o)
    if kind in LEARNED:
        prediction = LearnedVariance(prediction)
    rows = common.timestep_spacing(o, "clean", integer=True)
    return NoiseScheduler(common.discrete_path(o, False), rows, prediction, DDPM(VARIANCES[kind], final_noise=True))


def _ddim(o: Options) -> NoiseScheduler:
    rows = common.timestep_spacing(o, common.last_row(o), integer=True, stride_target=True)
    return NoiseScheduler(common.discrete_path(o, False), rows, common.prediction(o), DDIM(0.0))


def _euler(o: Options) -> NoiseScheduler:
    last, v = common.last_row(o), o.text("prediction_type") == "v_prediction"
    if o.text("timestep_type") != "continuous" or not v:
        path, spacing = common.ve_path_and_spacing(o, last)
        return NoiseScheduler(path, spacing, common.prediction(o), Euler())
    low, high, levels = o.optional("sigma_min"), o.optional("sigma_max"), common.level_spacing(o, last)
    if low is None or high is None or levels is None:
        path, spacing = common.ve_path_and_spacing(o, last)
        return NoiseScheduler(path, TimestepMap(spacing, "log_sigma"), common.prediction(o), Euler())
    path = EDMPath(1.0, "log_sigma", low, high)
    start = InitStdOverride(levels, "state" if o.text("timestep_spacing") == "leading" else "sigma")
    return NoiseScheduler(path, start, common.prediction(o), Euler())


def _ve_sampler(solver: Solver) -> Builder:
    def build(o: Options) -> NoiseScheduler:
        path, spacing = common.ve_path_and_spacing(o, "clean")
        return NoiseScheduler(path, spacing, common.prediction(o, recompute_eps=True), solver)

    return build


def _kdpm2(eta: float) -> Builder:
    def build(o: Options) -> NoiseScheduler:
        rows, spacing = common.ve_path_and_spacing(o, "clean")
        path = VECoordinates(common.discrete_path(o))
        levels = common.level_spacing(o, "clean")
        if levels is None:
            spacing = RowsFromPath(spacing, rows)
        elif isinstance(levels, Karras):
            spacing = TimestepMap(spacing, "round")
        return NoiseScheduler(path, spacing, common.prediction(o), DPM2(eta))

    return build


def _pndm(o: Options) -> NoiseScheduler:
    rows = common.timestep_spacing(o, common.last_row(o), integer=True, stride_target=True)
    solver = PNDM(runge_kutta=not o.flag("skip_prk_steps"), whole_times=True)
    return NoiseScheduler(common.discrete_path(o, False), rows, Eps(), solver)


def _lcm(o: Options) -> NoiseScheduler:
    rows = Distilled(o.count("original_inference_steps"))
    solver = LCM(timestep_scaling=o.number("timestep_scaling"))
    return NoiseScheduler(common.discrete_path(o, False), rows, common.prediction(o), solver)


def _tcd(o: Options) -> NoiseScheduler:
    rows = Distilled(o.count("original_inference_steps"), end="t_min")
    unclipped = Options(o.name, {**o.values, "clip_sample": False, "thresholding": False})  # TCD ignores both
    return NoiseScheduler(common.discrete_path(o, False), rows, common.prediction(unclipped), TCD())


def _flow_path_and_spacing(o: Options) -> tuple[NoisePath, Spacing]:
    """Return a flow with sigma from 1 to 1 / N: the end is shifted once first, then all rows are shifted."""
    total, shift = o.count("num_train_timesteps"), o.number("shift")
    path: NoisePath = FlowPath(float(total))
    if "use_dynamic_shifting" not in o.values:
        return path, FlowLinspace(shift, _shift_sigma(1 / total, shift))
    dynamic, terminal = o.flag("use_dynamic_shifting"), o.optional("shift_terminal") or None
    last = 1 / total if dynamic else _shift_sigma(1 / total, shift)
    spacing = common.dynamic_shift(o, FlowLinspace(1.0 if dynamic else shift, last, terminal=terminal))
    levels = common.level_spacing(o, "clean", level_kind="flow")
    return path, spacing if levels is None else RespacedLevels(spacing, levels)


def _shift_sigma(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _flow(solver: Solver) -> Builder:
    def build(o: Options) -> NoiseScheduler:
        path, spacing = _flow_path_and_spacing(o)
        stochastic = "stochastic_sampling" in o.values and o.flag("stochastic_sampling")
        return NoiseScheduler(path, spacing, Flow(), LCM(boundary=False) if stochastic else solver)

    return build


def _edm_euler(o: Options) -> NoiseScheduler:
    path, spacing = edm_path_and_spacing(o, "log_sigma")
    return NoiseScheduler(path, spacing, edm_prediction(o), Euler())


def _score_ve(o: Options) -> NoiseScheduler:
    path = GeometricVEPath(o.number("sigma_min"), o.number("sigma_max"), o.number("sampling_eps"))
    solver = PredictorCorrector(corrections=o.count("correct_steps"), snr=o.number("snr"))
    return NoiseScheduler(path, UniformTime(geometric_sigma=True), Score(), solver)


def _score_vp(o: Options) -> NoiseScheduler:
    path = ContinuousVPPath(o.number("beta_min"), o.number("beta_max"), t_min=o.number("sampling_eps"))
    return NoiseScheduler(path, UniformTime(), Eps(), EulerMaruyama(even_dt=True))


BUILDERS: dict[str, Builder] = {
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "DDIMParallelScheduler": _ddim,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _ve_sampler(DDIM(1.0)),
    "HeunDiscreteScheduler": _ve_sampler(Heun()),
    "KDPM2DiscreteScheduler": _kdpm2(0.0),
    "KDPM2AncestralDiscreteScheduler": _kdpm2(1.0),
    "LMSDiscreteScheduler": _ve_sampler(LMS()),
    "DPMSolverMultistepScheduler": dpm(single=False),
    "DPMSolverSinglestepScheduler": dpm(single=True),
    "UniPCMultistepScheduler": unipc,
    "DEISMultistepScheduler": deis,
    "PNDMScheduler": _pndm,
    "LCMScheduler": _lcm,
    "TCDScheduler": _tcd,
    "FlowMatchEulerDiscreteScheduler": _flow(Euler()),
    "FlowMatchHeunDiscreteScheduler": _flow(Heun()),
    "FlowMatchLCMScheduler": _flow(LCM(boundary=False)),
    "EDMEulerScheduler": _edm_euler,
    "EDMDPMSolverMultistepScheduler": edm_dpm("log_sigma"),
    "CosineDPMSolverMultistepScheduler": edm_dpm("arctan"),
    "ScoreSdeVeScheduler": _score_ve,
    "ScoreSdeVpScheduler": _score_vp,
}
