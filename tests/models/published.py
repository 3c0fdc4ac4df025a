"""Every published checkpoint that conf/model names, built on the meta device in both worlds: diffusers' and ours."""

import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import diffusers
import torch
from torch import nn

from harness.config.schema import RunConfig
from harness.resolve.checkpoint_defaults import denoiser_defaults
from harness.resolve.compose import compose_run
from models.files import read_json
from models.names import NameMap
from models.registry import ARCHITECTURES, PUBLISHED
from models.source import Source

CHECKPOINTS = sorted(path.name for path in PUBLISHED.iterdir() if path.is_dir()) if PUBLISHED.is_dir() else []
REMAPPED = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


@dataclass(frozen=True)
class Pair:
    """One denoiser in both worlds, on the meta device, and the map between their names."""

    config: RunConfig
    ours: nn.Module
    theirs: nn.Module
    names: NameMap


@cache
def pair(name: str) -> Pair:
    """The denoiser of conf/model/<name>.yaml, at its published size and without memory."""
    config = compose_run([f"model={name}", "model.load=dummy"]).config
    row = ARCHITECTURES[config.model.architecture]
    source = Source(PUBLISHED / name, denoiser_defaults(config).weights, device=torch.device("meta"), dummy=True)
    module = importlib.import_module(row.module)
    package = importlib.import_module(row.module.rpartition(".")[0])
    return Pair(config, module.load_denoiser(source), their(PUBLISHED / name / source.denoiser), names_of(package))


def names_of(package: object) -> NameMap:
    """A family's map of names; the UNets are diffusers' own and need none."""
    return getattr(package, "NAMES", NameMap())


def their(folder: Path) -> nn.Module:
    """diffusers' network of a config.json, on the meta device; older files name a class that it maps by norm_type."""
    config = read_json(folder / "config.json")
    name = str(config["_class_name"])
    if name == "Transformer2DModel":
        name = REMAPPED[str(config["norm_type"])]
    with torch.device("meta"):
        return getattr(diffusers, name).from_config(config)
