"""Where each component of a checkpoint is read from, and how it is loaded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from models.files import component_files, find_config_folder, read_json
from models.tensor_slice import ShardWeights


@dataclass(frozen=True)
class LoraFile:
    """Low-rank updates to merge at load: W + weight * (alpha / rank) * B A."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class LoadReport:
    """The result of loading one component.

    Args:
        component: The component's folder name.
        path: The folder or file of its weights; for random weights, of its configuration.
        dtype: The requested dtype; a network may keep some parameters in float32.
        parameters: The number of parameters.
        bytes: The size of the parameters, in bytes.
        load_ms: The time to build and fill it, in ms.
        merged: The number of tensors that low-rank updates were merged into.
        read_bytes: The number of bytes read from the checkpoint's files, without low-rank updates.
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
class CheckpointSource:
    """One checkpoint in the diffusers layout, by component (`transformer`, `vae`, `text_encoder` ...).

    Args:
        folder: The checkpoint's folder.
        denoiser: The denoiser's folder in it.
        device: The device of the components.
        devices: The device of single components that differ, by component.
        dtype: The dtype of the denoiser, and of components that `dtypes` does not name.
        dtypes: The dtype of single components.
        replaced: The replacement of single components: another folder (with its config.json) or one safetensors file
            (described by a config.json beside it, else by the checkpoint's own).
        dummy: Whether to use random weights of the architecture in the config files; no weights are read.
        text_tokens: The number of tokens that a prompt is padded or truncated to.
        loras: The updates merged into the denoiser and the text encoders, in order.
        shard_network: The function that shards the denoiser before its weights are read; None for the full network.
        loaded: The last load report of each component; the loaders write it.
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
    shard_network: ShardWeights | None = None
    loaded: dict[str, LoadReport] = field(default_factory=dict, compare=False)

    def has(self, component: str) -> bool:
        """Return whether the checkpoint has this component (some are optional)."""
        return self.config_folder(component).is_dir()

    def config_folder(self, component: str) -> Path:
        """Return the folder with the component's config.json, or its tokenizer's files."""
        return find_config_folder(self.replaced.get(component), self.folder / component)

    def config(self, component: str) -> dict[str, object]:
        """Return the component's config.json.

        Raises:
            CheckpointError: No such file, or not a JSON object.
        """
        return read_json(self.config_folder(component) / "config.json")

    def weights(self, component: str) -> list[Path]:
        """Return the component's safetensors files.

        Raises:
            CheckpointError: No weights, or a missing shard.
        """
        return component_files(self.path_of(component))

    def path_of(self, component: str) -> Path:
        """Return the location of the component's weights: a folder, or the file that replaces it."""
        return self.replaced.get(component, self.folder / component)

    def dtype_of(self, component: str) -> torch.dtype:
        """Return the dtype that the component is loaded in."""
        return self.dtypes.get(component, self.dtype)

    def device_of(self, component: str) -> torch.device:
        """Return the device that a component is loaded to."""
        return self.devices.get(component, self.device)

    def index(self) -> dict[str, object]:
        """Return the checkpoint's model_index.json, empty if there is none."""
        path = self.folder / "model_index.json"
        return read_json(path) if path.is_file() else {}

    def record(self, component: str, module: nn.Module, started: float, merged: int = 0, read_bytes: int = 0) -> None:
        """Record the load of a component.

        Args:
            component: The component's folder name.
            module: The loaded module.
            started: The time.perf_counter() at the start of the load, in seconds.
            merged: The number of tensors that low-rank updates were merged into.
            read_bytes: The number of bytes read from the checkpoint's files.
        """
        parameters = list(module.parameters())
        self.loaded[component] = LoadReport(
            component,
            self.path_of(component),
            str(self.dtype_of(component)).removeprefix("torch."),
            sum(p.numel() for p in parameters),
            sum(p.numel() * p.element_size() for p in parameters),
            (time.perf_counter() - started) * 1e3,
            merged,
            read_bytes,
        )
