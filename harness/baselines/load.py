"""diffusers' denoisers with the checkpoint's weights, or with the random weights that the native network would have."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from models.checkpoint import fill
from models.empty import build_empty, fill_dummy
from models.files import CheckpointError
from models.names import NameMap
from models.source import Source

SAME = NameMap()
M = TypeVar("M", bound=ModelMixin)


def load_denoiser(
    source: Source,
    kind: type[M],
    native: nn.Module,
    names: NameMap,
    others: Sequence[str] = (),
    stored: NameMap = SAME,
) -> M:
    """A denoiser of diffusers in evaluation mode, filled by the code that fills the native one.

    Args:
        source: the checkpoint.
        kind: its class.
        native: the native network on the meta device; the order of its parameters is that of random weights.
        names: from diffusers' names to the native network's.
        others: older classes that its config.json may state.
        stored: from names of older files to diffusers' own.

    Raises:
        CheckpointError: a configuration that diffusers cannot build, or weights that do not fit it.
    """
    component, began = source.denoiser, time.perf_counter()
    folder, dtype = source.config_folder(component), source.dtype_of(component)
    stated = source.config(component).get("_class_name")
    if stated not in (kind.__name__, *others):
        raise CheckpointError(
            f"{folder}: config.json says _class_name={stated}; diffusers' pipeline takes {kind.__name__}"
        )
    try:
        config = kind.load_config(folder, local_files_only=True)
        model = build_empty(lambda: kind.from_config(config), dtype, source.device)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: {component} cannot be built from its config.json ({line})") from error
    _keep_float32(model)
    if source.dummy:
        places = {names.theirs(name): place for place, (name, _) in enumerate(native.named_parameters())}
        fill_dummy(model, places=places)
        source.record(component, model, began)
    else:
        fill(model, source, component, stored, began)
    return model.requires_grad_(False).eval()


def _keep_float32(model: ModelMixin) -> None:
    """What `from_pretrained` does with the modules that a class wants in float32 whatever the dtype."""
    float32_modules = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if float32_modules & set(name.split(".")):
            parameter.data = parameter.data.float()
