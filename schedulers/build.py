"""From plain settings to a NoiseScheduler: the one place that branches on names."""

from schedulers import paths, prediction, spacing
from schedulers.families import FAMILIES, Settings, resolve
from schedulers.noise_scheduler import NoiseScheduler
from schedulers.solvers.base import Solver
from schedulers.solvers.euler import DDIM, Euler
from schedulers.solvers.heun import Heun


def build(settings: Settings) -> NoiseScheduler:
    """The noise scheduler that the settings name. Raises ValueError as `families.resolve` does, or for a bad value."""
    s = resolve(settings)
    return NoiseScheduler(_path(s), _spacing(s), _prediction(s), _solver(s))


def _path(s: Settings) -> paths.NoisePath:
    match FAMILIES[s.family].path:
        case "flow":
            return paths.FlowPath()
        case "edm":
            edm = paths.EDMPath()
            return paths.EDMPath(
                edm.sigma_data if s.sigma_data is None else s.sigma_data,
                s.tau_map or edm.tau_map,
                edm.t_min if s.sigma_min is None else s.sigma_min,
                edm.t_max if s.sigma_max is None else s.sigma_max,
            )
        case "discrete_vp":
            betas = paths.betas(
                s.beta_schedule or "linear",
                1e-4 if s.beta_start is None else s.beta_start,
                0.02 if s.beta_end is None else s.beta_end,
                1000 if s.train_steps is None else s.train_steps,
            )
            path = paths.DiscreteVPPath(betas)
            return paths.VECoordinates(path) if s.coordinates == "ve" else path


def _spacing(s: Settings) -> spacing.Spacing:
    end = s.end or "clean"
    match FAMILIES[s.family].path, s.spacing:
        case "flow", "linspace":
            return spacing.FlowLinspace(1.0 if s.shift is None else s.shift, s.sigma_last)
        case _, "leading":
            return spacing.Leading(s.steps_offset or 0, end)
        case _, "trailing":
            return spacing.Trailing(end)
        case _, "linspace":
            return spacing.Linspace(s.integer_timesteps is not False, end)
        case _, "karras":
            return spacing.Karras(7.0 if s.rho is None else s.rho, s.sigma_min, s.sigma_max, end)
    raise ValueError(f"spacing={s.spacing} has no object behind it on family={s.family}")


def _prediction(s: Settings) -> prediction.Prediction:
    kinds: dict[str, prediction.Prediction] = {
        "eps": prediction.Eps(),
        "x0": prediction.X0(),
        "v": prediction.V(),
        "flow": prediction.Flow(),
        "edm": prediction.EDM(0.5 if s.sigma_data is None else s.sigma_data, s.edm_sign or 1),
    }
    kind = kinds[s.prediction or ""]
    return kind if s.clip is None else prediction.Clipped(kind, s.clip)


def _solver(s: Settings) -> Solver:
    match s.solver:
        case "euler":
            return Euler()
        case "ddim":
            return DDIM(s.eta or 0.0)
        case "heun":
            return Heun()
    raise ValueError(f"solver={s.solver} has no object behind it")
