"""diffusers' denoisers with the checkpoint's weights, or with the random weights of the native network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from models.checkpoint import load_weights
from models.checkpoint_source import CheckpointSource
from models.files import CheckpointError
from models.meta_init import build_empty, fill_dummy
from models.names import NameMap

SAME = NameMap()
M = TypeVar("M", bound=ModelMixin)


def load_denoiser(
    source: CheckpointSource,
    kind: type[M],
    native: nn.Module,
    names: NameMap,
    others: Sequence[str] = (),
    stored: NameMap = SAME,
) -> M:
    """Return a diffusers denoiser in evaluation mode, filled by the code that fills the native one.

    Args:
        source: the checkpoint.
        kind: the denoiser's class.
        native: the native network on the meta device; random weights follow the order of its parameters.
        names: the map from diffusers' names to the native network's.
        others: older class names that the checkpoint's config.json may have.
        stored: the map from the names in older files to diffusers' own.

    Raises:
        CheckpointError: a configuration that diffusers cannot build, or weights that do not fit it.
    """
    component, start = source.denoiser, time.perf_counter()
    folder, dtype = source.config_folder(component), source.dtype_of(component)
    class_name = source.config(component).get("_class_name")
    if class_name not in (kind.__name__, *others):
        raise CheckpointError(
            f"{folder}: config.json says _class_name={class_name}; diffusers' pipeline takes {kind.__name__}"
        )
    try:
        config = kind.load_config(folder, local_files_only=True)
        model = build_empty(lambda: kind.from_config(config), dtype, source.device)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: {component} cannot be built from its config.json ({line})") from error
    _keep_float32(model)
    if source.dummy:
        positions = {names.to_published(name): position for position, (name, _) in enumerate(native.named_parameters())}
        fill_dummy(model, order=positions)
        source.record(component, model, start)
    else:
        load_weights(model, source, component, stored, start)
    return model.requires_grad_(False).eval()


def _keep_float32(model: ModelMixin) -> None:
    """Keep modules in float32 whatever the dtype, if their class wants that, as `from_pretrained` does."""
    float32_modules = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if float32_modules & set(name.split(".")):
            parameter.data = parameter.data.float()
