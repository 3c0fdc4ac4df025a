"""Where each component of a checkpoint is read from, and in which form it is loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from models.files import config_home, read_json, weight_files
from models.parts import Cut


@dataclass(frozen=True)
class LoraFile:
    """Low-rank updates to merge at load: W + weight * (alpha / rank) * B A."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Loaded:
    """What became of one component.

    Args:
        component: its folder's name.
        path: where its weights, or for random ones its configuration, were read.
        dtype: asked for; a network may keep a part in float32.
        parameters: how many numbers.
        bytes: that they take.
        load_ms: what building and filling it took.
        merged: tensors that low-rank updates were merged into.
        read_bytes: of the checkpoint's files, low-rank updates apart.
    """

    component: str
    path: Path
    dtype: str
    parameters: int
    bytes: int
    load_ms: float
    merged: int = 0
    read_bytes: int = 0


@dataclass(frozen=True)
class Source:
    """One checkpoint in the diffusers layout, seen component by component (`transformer`, `vae`, `text_encoder` ...).

    Args:
        folder: the checkpoint.
        denoiser: the network's folder in it.
        device: where components live.
        devices: by component, where it is loaded to instead.
        dtype: of the denoiser, and of what `dtypes` does not name.
        dtypes: by component.
        replaced: by component, another folder (with its config.json) or one safetensors file (described by a
            config.json beside it, else by the checkpoint's own).
        dummy: random weights of the architecture that the config files describe; no weights are read.
        text_tokens: tokens a prompt is padded or cut to.
        loras: updates merged into the denoiser and the text encoders, in order.
        cut: what the denoiser is made smaller by before it is read; None for the whole network.
        loaded: by component, what was loaded last; those who load write it.
    """

    folder: Path
    denoiser: str = "transformer"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    devices: Mapping[str, torch.device] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    replaced: Mapping[str, Path] = field(default_factory=dict)
    dummy: bool = False
    text_tokens: int = 128
    loras: tuple[LoraFile, ...] = ()
    cut: Cut | None = None
    loaded: dict[str, Loaded] = field(default_factory=dict, compare=False)

    def has(self, component: str) -> bool:
        """Whether the checkpoint has this component (some are optional)."""
        return self.config_folder(component).is_dir()

    def config_folder(self, component: str) -> Path:
        """The folder with the component's config.json, or its tokenizer's files."""
        return config_home(self.replaced.get(component), self.folder / component)

    def config(self, component: str) -> dict[str, object]:
        """The component's config.json.

        Raises:
            CheckpointError: none there, or not a JSON object.
        """
        return read_json(self.config_folder(component) / "config.json")

    def weights(self, component: str) -> list[Path]:
        """The component's safetensors files.

        Raises:
            CheckpointError: none there, or a shard is missing.
        """
        other = self.replaced.get(component)
        if other is not None and other.is_file():
            return [other]
        return weight_files(self.config_folder(component))

    def path_of(self, component: str) -> Path:
        """Where the component's weights are: a folder, or the file that replaces them."""
        return self.replaced.get(component, self.folder / component)

    def dtype_of(self, component: str) -> torch.dtype:
        """The dtype the component is loaded in."""
        return self.dtypes.get(component, self.dtype)

    def device_of(self, component: str) -> torch.device:
        """The device that a component is loaded to."""
        return self.devices.get(component, self.device)

    def index(self) -> dict[str, object]:
        """model_index.json of the checkpoint, empty where there is none."""
        path = self.folder / "model_index.json"
        return read_json(path) if path.is_file() else {}

    def record(self, component: str, module: nn.Module, began: float, merged: int = 0, read_bytes: int = 0) -> None:
        """Notes a component that was loaded, `began` being time.perf_counter() before."""
        parameters = list(module.parameters())
        self.loaded[component] = Loaded(
            component,
            self.path_of(component),
            str(self.dtype_of(component)).removeprefix("torch."),
            sum(p.numel() for p in parameters),
            sum(p.numel() * p.element_size() for p in parameters),
            (time.perf_counter() - began) * 1e3,
            merged,
            read_bytes,
        )
