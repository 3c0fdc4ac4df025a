"""Gaussian noise paths, the first part of a family."""

from schedulers.paths.base import NoisePath
from schedulers.paths.flow import FlowPath
from schedulers.paths.ve import EDMPath, GeometricVEPath, TauMap, VECoordinates
from schedulers.paths.vp import BetaSchedule, ContinuousVPPath, DiscreteVPPath, betas, zero_terminal_snr

__all__ = [
    "BetaSchedule",
    "ContinuousVPPath",
    "DiscreteVPPath",
    "EDMPath",
    "FlowPath",
    "GeometricVEPath",
    "NoisePath",
    "TauMap",
    "VECoordinates",
    "betas",
    "zero_terminal_snr",
]
