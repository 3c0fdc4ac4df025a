"""The configurations of every mapped class of diffusers that are run against it."""

from typing import Any

from tests.schedulers.parity import Case

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
KARRAS, EXPONENTIAL, BETA = ({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta"))
V, X0 = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
LEADING, TRAILING, LINSPACE = ({"timestep_spacing": kind} for kind in ("leading", "trailing", "linspace"))
OFFSET = {"steps_offset": 1}
ZERO_SNR = {"rescale_betas_zero_snr": True}
KEPT = {"final_sigmas_type": "sigma_min"}
THRESHOLD = {"thresholding": True, "sample_max_value": 1.5}
RAW = {"clip_sample": False}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DYNAMIC = {"use_dynamic_shifting": True}
TRAINED = {"trained_betas": [1e-4 * 1.6**i for i in range(12)], "num_train_timesteps": 12}

DDPM = [
    {},
    {"variance_type": "fixed_large"},
    {"variance_type": "fixed_large", **TRAILING},
    {"variance_type": "fixed_large", **OFFSET},
    {"variance_type": "fixed_small_log", **LINSPACE},
    {"variance_type": "learned_range", **RAW},
    {"variance_type": "learned", **TRAILING},
    {**V, **COSINE},
    {**X0, **SD, **RAW},
    {**THRESHOLD, "beta_schedule": "sigmoid"},
    {**V, **ZERO_SNR, **TRAILING, **RAW},
]
DDIM = [
    {},
    {**SD, **OFFSET, **RAW, "set_alpha_to_one": False},
    {**V, **SD, **RAW},
    {**X0, **COSINE},
    {**TRAILING, **RAW},
    {**LINSPACE, **RAW},
    {**THRESHOLD},
    {**V, **ZERO_SNR, **TRAILING, **SD, **RAW},
]
VE = [
    {**SD},
    {**SD, **LEADING, **OFFSET},
    {**SD, **TRAILING},
    {**V, **SD, **LEADING},
]
LEVELS: list[dict[str, Any]] = [
    {**SD, **KARRAS},
    {**SD, **KARRAS, **LEADING, **OFFSET},
    {**SD, **EXPONENTIAL, **TRAILING},
    {**SD, **BETA},
]
EULER = [
    {**X0, **SD},
    {**SD, **KARRAS, "sigma_min": 0.05, "sigma_max": 12.0},
    {**SD, **KEPT},
    {**V, **SD, **ZERO_SNR, **TRAILING},
    {**V, **SD, "timestep_type": "continuous"},
    {**V, **SD, **KARRAS, "timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0, **LEADING},
    {**COSINE},
]
MULTISTEP: list[dict[str, Any]] = [
    {**SD},
    {**SD, **LEADING, **OFFSET},
    {**SD, **TRAILING},
    {**V, **SD},
    {**X0, **SD},
    {**SD, "solver_order": 1},
    {**SD, "solver_order": 3},
    {**SD, "solver_order": 3, "lower_order_final": False, **KEPT},
    {**SD, **KARRAS},
    {**SD, **EXPONENTIAL},
    {**SD, **BETA},
    {**THRESHOLD},
    {**FLOW, "flow_shift": 3.0},
]
DPM = [
    {**SD, "solver_type": "heun"},
    {**SD, "euler_at_final": True, **KEPT},
    {**SD, **KARRAS, **KEPT, "solver_order": 3, "euler_at_final": True},
    {**SD, **KARRAS, "sigma_min": 0.05},
    {**COSINE, **KARRAS, "sigma_max": 50.0},
    {**COSINE, "lambda_min_clipped": -5.1},
    {**COSINE, "lambda_min_clipped": -5.1, **LEADING},
    {**V, **ZERO_SNR, **TRAILING, **SD},
    {**SD, **KEPT, "algorithm_type": "dpmsolver"},
    {**SD, **KEPT, "algorithm_type": "dpmsolver", "solver_order": 3},
    {**V, **SD, **KEPT, "algorithm_type": "dpmsolver", "solver_type": "heun"},
    {**THRESHOLD, **KEPT, "algorithm_type": "dpmsolver"},
    {**SD, "algorithm_type": "sde-dpmsolver++"},
    {**SD, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun", **KARRAS},
    {**SD, "algorithm_type": "sde-dpmsolver++", "solver_order": 1, **KEPT},
    {**SD, "algorithm_type": "deis", "solver_type": "logrho", **KEPT},
]
SINGLE = [
    {**SD},
    {**SD, "solver_order": 3, "lower_order_final": True},
    {**SD, "solver_order": 3, "solver_type": "heun", "lower_order_final": True},
    {**SD, **KEPT},
    {**SD, "solver_order": 1},
    {**SD, **KARRAS},
    {**SD, **BETA},
    {**V, **SD, "solver_type": "heun"},
    {**THRESHOLD, "lower_order_final": True},
    {**SD, **KEPT, "algorithm_type": "dpmsolver", "lower_order_final": True},
    {**SD, **KEPT, "algorithm_type": "dpmsolver", "solver_order": 3, "solver_type": "heun", "lower_order_final": True},
    {**SD, "algorithm_type": "sde-dpmsolver++"},
    {**SD, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    {**SD, "algorithm_type": "sde-dpmsolver++", "solver_order": 3, "lower_order_final": True},
    {**FLOW, "flow_shift": 3.0},
]
UNIPC = [
    {**SD, "solver_type": "bh1", **KEPT},
    {**SD, "disable_corrector": [0, 3]},
    {**SD, **KEPT, "predict_x0": False},
    {**SD, **KEPT, "predict_x0": False, "solver_order": 3},
    {**SD, **KARRAS, **KEPT},
    {**SD, **KARRAS, "sigma_min": 0.05, "sigma_max": 12.0},
    {**V, **ZERO_SNR, **TRAILING, **SD},
    {**FLOW, "flow_shift": 3.0, **KEPT, "shift_terminal": 0.1},
    {**FLOW, **KARRAS},
]
FLOW_MATCH: list[dict[str, Any]] = [
    {},
    {"shift": 3.0},
    {"shift": 3.0, **KARRAS},
    {"shift": 2.0, **EXPONENTIAL},
    {**BETA},
    {"shift": 3.0, "shift_terminal": 0.1},
]
EDM = [{}, {"sigma_schedule": "exponential"}, {**V, "sigma_data": 1.0, "rho": 5.0}, {**KEPT, "sigma_max": 50.0}]

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "DDPMScheduler": [*DDPM, {**TRAINED, "variance_type": "fixed_large"}],
    "DDPMParallelScheduler": DDPM[:3],
    "DDIMScheduler": DDIM,
    "DDIMParallelScheduler": DDIM[:3],
    "EulerDiscreteScheduler": [*VE, *LEVELS, *EULER],
    "EulerAncestralDiscreteScheduler": [*VE, {**V, **SD, **ZERO_SNR, **TRAILING}],
    "HeunDiscreteScheduler": [*VE, *LEVELS, {**X0, **SD}, {"clip_sample": True}, {"beta_schedule": "exp"}],
    "KDPM2DiscreteScheduler": [*VE, *LEVELS],
    "KDPM2AncestralDiscreteScheduler": [*VE, *LEVELS],
    "LMSDiscreteScheduler": [*VE, *LEVELS, {**X0, **SD}],
    "DPMSolverMultistepScheduler": [*MULTISTEP, *DPM],
    "DPMSolverSinglestepScheduler": SINGLE,
    "UniPCMultistepScheduler": [*MULTISTEP, *UNIPC],
    "DEISMultistepScheduler": MULTISTEP,
    "PNDMScheduler": [
        {"skip_prk_steps": True},
        {"skip_prk_steps": True, **SD, **OFFSET},
        {"skip_prk_steps": True, **SD, "set_alpha_to_one": True},
        {"skip_prk_steps": False},
    ],
    "LCMScheduler": [
        {},
        {**V, "clip_sample": True, "timestep_scaling": 1.0},
        {**X0, **THRESHOLD},
        {**V, **ZERO_SNR},
    ],
    "TCDScheduler": [{}, {**V, "set_alpha_to_one": False}, {**X0}],
    "FlowMatchEulerDiscreteScheduler": [*FLOW_MATCH, {"stochastic_sampling": True}],
    "FlowMatchHeunDiscreteScheduler": FLOW_MATCH[:2],
    "FlowMatchLCMScheduler": FLOW_MATCH,
    "EDMEulerScheduler": EDM,
    "EDMDPMSolverMultistepScheduler": [
        *EDM,
        {"solver_order": 3},
        {"solver_type": "heun", **THRESHOLD},
        {"algorithm_type": "sde-dpmsolver++"},
    ],
    "CosineDPMSolverMultistepScheduler": [{}, {"solver_order": 1, **KEPT}, {"sigma_schedule": "karras"}],
    "ScoreSdeVeScheduler": [{}, {"correct_steps": 2, "snr": 0.1, "sigma_max": 50.0}],
    "ScoreSdeVpScheduler": [{}, {"beta_max": 10.0, "sampling_eps": 1e-2}],
}

SHIFTED = [
    Case(name, {**DYNAMIC, **options}, {"mu": mu}, tokens)
    for name, options, mu, tokens in [
        ("FlowMatchEulerDiscreteScheduler", {}, 1.15, 4096),
        ("FlowMatchEulerDiscreteScheduler", {"time_shift_type": "linear", "shift_terminal": 0.1}, 0.5, 256),
        ("FlowMatchEulerDiscreteScheduler", {**KARRAS, "max_shift": 0.9, "max_image_seq_len": 8192}, 0.9, 8192),
        ("FlowMatchLCMScheduler", {}, 0.5, 256),
        ("DPMSolverMultistepScheduler", {**FLOW}, 1.15, 4096),
        ("UniPCMultistepScheduler", {**FLOW}, 1.15, 4096),
    ]
]


def _most(name: str, options: dict[str, Any]) -> int:
    """Where diffusers itself stops: at 50 steps the first two beta levels get one timestep, and it skips a step."""
    if "trained_betas" in options:
        return 10
    return 20 if options.get("use_beta_sigmas") and "Multistep" in name + "Multistep" * ("Single" in name) else 1000


CASES = [Case(name, o, most=_most(name, o)) for name, several in OPTIONS.items() for o in several] + SHIFTED


ROUNDED: list[tuple[str, dict[str, Any]]] = [
    ("DDPM", {"prediction_type": "v_prediction", **COSINE}),
    ("DDPM", TRAINED),
    ("DDIM", {**X0, **COSINE}),
    ("EulerDiscrete", {**V, **ZERO_SNR}),
    ("Heun", {**X0}),
    ("Heun", {"beta_schedule": "exp"}),
    ("LMS", EXPONENTIAL),
    ("DEIS", {"solver_order": 3}),
    ("DEIS", FLOW),
]
"""Cases in which the float32 tables of diffusers alone make more than 1e-5; in float64 they agree like all others."""


def bound(case: Case) -> float:
    """The relative difference allowed in float32.

    Multistep classes cut the timesteps of exponential and beta levels to whole numbers: the first, 999 up to rounding,
    is 998 in diffusers' float32, so the network is told another number once.
    """
    cut = "use_exponential_sigmas" in case.options or "use_beta_sigmas" in case.options
    if cut and case.name.startswith(("DPMSolver", "UniPC", "DEIS")):
        return 3e-4
    rounded = any(
        case.name.startswith(name) and all(case.options.get(k) == v for k, v in some.items()) for name, some in ROUNDED
    )
    return 1e-4 if rounded else 1e-5


DPM_REFUSALS: list[dict[str, Any]] = [
    {"algorithm_type": "sde-dpmsolver"},
    {"final_sigmas_type": "zero", "algorithm_type": "dpmsolver"},
    {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    {"final_sigmas_type": "sigma_min", "use_flow_sigmas": True},
    {"use_flow_sigmas": True, **KARRAS, "prediction_type": "flow_prediction"},
    {"prediction_type": "v_prediction", "use_flow_sigmas": True},
    {"prediction_type": "flow_prediction"},
]
REFUSALS: dict[str, list[dict[str, Any]]] = {
    "DDPMScheduler": [{"variance_type": "fixed_large_log"}, {"beta_schedule": "laplace"}],
    "EulerDiscreteScheduler": [
        {"interpolation_type": "log_linear"},
        {"sigma_max": 700.0, **KARRAS},
        {"use_beta_sigmas": True, **KARRAS},
        {
            "final_sigmas_type": "sigma_min",
            **V,
            **KARRAS,
            "timestep_type": "continuous",
            "sigma_min": 0.1,
            "sigma_max": 9.0,
        },
    ],
    "EulerAncestralDiscreteScheduler": [{"prediction_type": "sample"}],
    "KDPM2DiscreteScheduler": [{"prediction_type": "sample"}],
    "KDPM2AncestralDiscreteScheduler": [{"prediction_type": "sample"}],
    "PNDMScheduler": [{"timestep_spacing": "trailing"}, {"prediction_type": "v_prediction"}],
    "DPMSolverMultistepScheduler": [
        *DPM_REFUSALS,
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
        {"use_lu_lambdas": True},
        {"lambda_min_clipped": -5.1, **TRAILING},
    ],
    "DPMSolverSinglestepScheduler": [*DPM_REFUSALS, {"thresholding": True, "algorithm_type": "dpmsolver", **KEPT}],
    "UniPCMultistepScheduler": [
        {"solver_p": {"order": 1}},
        {"final_sigmas_type": "zero", "predict_x0": False},
        {"use_flow_sigmas": True, **EXPONENTIAL, "prediction_type": "flow_prediction"},
        {"prediction_type": "flow_prediction"},
    ],
    "DEISMultistepScheduler": [{"prediction_type": "flow_prediction"}],
    "FlowMatchEulerDiscreteScheduler": [{"invert_sigmas": True}],
    "FlowMatchLCMScheduler": [{"invert_sigmas": True}, {"scale_factors": [0.5]}],
    "EDMEulerScheduler": [{"prediction_type": "sample"}],
    "EDMDPMSolverMultistepScheduler": [
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "dpmsolver", **KEPT},
    ],
    "CosineDPMSolverMultistepScheduler": [{"solver_order": 3}],
}
"""What diffusers takes (or its constructor lets through) and from_diffusers refuses, the option at fault first."""

UNKNOWN: dict[str, list[dict[str, Any]]] = {
    "DDIMScheduler": [{"beta_schedule": "cosine"}, {"timestep_spacing": "even"}],
    "EulerDiscreteScheduler": [{"final_sigmas_type": "one"}],
    "DPMSolverMultistepScheduler": [{"solver_type": "bh3"}],
    "FlowMatchEulerDiscreteScheduler": [{"time_shift_type": "cubic", **DYNAMIC}],
    "EDMEulerScheduler": [{"sigma_schedule": "linear"}],
}
"""Values that no class knows, refused likewise."""
