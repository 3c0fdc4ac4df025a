"""What a launcher checks of a denoiser's config.json, and the tensors that it then expects; without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from models.configs import dit, flux, pixart, qwen_image, sd3, unet, wan, z_image
from models.configs.shapes import TensorShapes

TRANSFORMERS: Mapping[str, Callable[[Path], TensorShapes]] = {
    "dit": lambda folder: dit.tensor_shapes(dit.read_config(folder)),
    "flux": lambda folder: flux.tensor_shapes(flux.read_config(folder)),
    "pixart": lambda folder: pixart.tensor_shapes(pixart.read_config(folder)),
    "qwen_image": lambda folder: qwen_image.tensor_shapes(qwen_image.read_config(folder)),
    "sd3": lambda folder: sd3.tensor_shapes(sd3.read_config(folder)),
    "wan": lambda folder: wan.tensor_shapes(wan.read_config(folder)),
    "z_image": lambda folder: z_image.tensor_shapes(z_image.read_config(folder)),
}
UNETS: Mapping[str, Callable[[Path], None]] = {
    "sd": lambda folder: unet.check_conditional(folder, None),
    "sdxl": lambda folder: unet.check_conditional(folder, "text_time"),
    "unet": unet.check_unconditional,
}


def expected_tensors(architecture: str, folder: Path) -> TensorShapes | None:
    """Check a denoiser's config.json, and return the shapes of its tensors by published name.

    Args:
        architecture: The name of the architecture.
        folder: The denoiser's folder.

    Returns:
        The shapes; None for a UNet, which diffusers builds.

    Raises:
        CheckpointError: An option that the network does not support.
    """
    if architecture in UNETS:
        UNETS[architecture](folder)
        return None
    return TRANSFORMERS[architecture](folder)
