"""Whether prompts, their number of tokens and guidance are what the networks take; checked without torch."""

from __future__ import annotations

from harness.config.schema import ModelConfig
from harness.messages import GenerationRequest
from harness.resolve.checkpoint import CheckpointLayout
from models.files import read_json
from models.prompt_rules import check_no_prompt, class_number, read_names
from models.registry import ARCHITECTURES

CLIP_POSITIONS = 77  # transformers' default


def check_prompts(model: ModelConfig, layout: CheckpointLayout, denoiser: str, request: GenerationRequest) -> None:
    """Refuse a prompt that is no class of a class-conditional network, and any prompt of an unconditional one.

    Args:
        model: The `model` group.
        layout: The checkpoint's layout on disk.
        denoiser: The network's folder in the checkpoint.
        request: The request.

    Raises:
        ValueError: One line says what to give instead.
    """
    prompts = (*request.prompts, request.negative_prompt)
    if model.architecture == "unet":
        for prompt in prompts:
            check_no_prompt(prompt)
        check_guidance(request, has_guidance=False)
    if model.architecture == "dit":
        index = layout.folder / "model_index.json"
        names = read_names(read_json(index) if index.is_file() else {})
        classes = read_json(layout.config_folder(denoiser) / "config.json").get("num_embeds_ada_norm")
        if isinstance(classes, int):
            for prompt in prompts:
                class_number(prompt, names, classes)


def check_text_tokens(model: ModelConfig, layout: CheckpointLayout) -> None:
    """Refuse more tokens than a CLIP encoder has positions for, where model.text.tokens is its number.

    Args:
        model: The `model` group.
        layout: The checkpoint's layout on disk.

    Raises:
        ValueError: One line says how many it takes.
    """
    if model.architecture not in ("sd", "sdxl"):
        return
    for encoder in set(ARCHITECTURES[model.architecture].weights) - {"vae"}:
        file = layout.config_folder(encoder) / "config.json"
        limit = read_json(file).get("max_position_embeddings", CLIP_POSITIONS) if file.is_file() else CLIP_POSITIONS
        if isinstance(limit, int) and model.text.tokens > limit:
            raise ValueError(f"model.text.tokens={model.text.tokens}; {file.parent} takes {limit} at most")


def check_guidance(request: GenerationRequest, has_guidance: bool) -> None:
    """Refuse guidance of a network that has none.

    Args:
        request: The request.
        has_guidance: Whether the network has guidance.

    Raises:
        ValueError: The scale is another than 1.
    """
    if request.guidance != 1 and not has_guidance:
        raise ValueError(f"request.guidance={request.guidance}, but this model has no guidance; set it to 1")
