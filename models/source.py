"""Where each component of a checkpoint is read from, and in which form it is loaded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from models.files import read_json, weight_files


@dataclass(frozen=True)
class LoraFile:
    """Low-rank updates to merge at load: W + weight * (alpha / rank) * B A."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Source:
    """One checkpoint in the diffusers layout, seen component by component (`transformer`, `vae`, `text_encoder` ...).

    Args:
        folder: the checkpoint.
        denoiser: the network's folder in it.
        device: where components live.
        dtype: of the denoiser, and of what `dtypes` does not name.
        dtypes: by component.
        replaced: by component, another folder (with its config.json) or one safetensors file (for the same config).
        dummy: random weights of the architecture that the config files describe; no weights are read.
        text_tokens: tokens a prompt is padded or cut to.
        loras: updates merged into the denoiser and the text encoders, in order.
    """

    folder: Path
    denoiser: str = "transformer"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    replaced: Mapping[str, Path] = field(default_factory=dict)
    dummy: bool = False
    text_tokens: int = 128
    loras: tuple[LoraFile, ...] = ()

    def has(self, component: str) -> bool:
        """Whether the checkpoint has this component (some are optional)."""
        return self.config_folder(component).is_dir()

    def config_folder(self, component: str) -> Path:
        """The folder with the component's config.json, or its tokenizer's files."""
        other = self.replaced.get(component)
        return other if other is not None and other.is_dir() else self.folder / component

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

    def dtype_of(self, component: str) -> torch.dtype:
        """The dtype the component is loaded in."""
        return self.dtypes.get(component, self.dtype)

    def index(self) -> dict[str, object]:
        """model_index.json of the checkpoint, empty where there is none."""
        path = self.folder / "model_index.json"
        return read_json(path) if path.is_file() else {}

    @contextmanager
    def as_folder(self, component: str) -> Iterator[Path]:
        """The component as a folder that transformers and diffusers load, also where a single file replaces its
        weights.
        """
        other = self.replaced.get(component)
        if other is None or other.is_dir():
            yield self.config_folder(component)
            return
        with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
            for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
                (Path(folder) / name).symlink_to(other.resolve())
            (Path(folder) / "config.json").write_text(json.dumps(self.config(component)))
            yield Path(folder)
