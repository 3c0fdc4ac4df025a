"""Which degrees of a layout fit the sizes of a network and a request; checked without torch.

Which features of a layout do not go together at any size is in harness.resolve.conflicts.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.schema import Decode, ParallelConfig
from harness.parallel.mesh import TEMPORAL_HALO


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a network and a request that a layout has to fit.

    Attributes:
        model: The model's name, for messages.
        heads: Attention heads of the network; None if tokens and heads cannot be sharded (a UNet).
        depth: Blocks of the network, of the first kind if it has several.
        tokens: Image tokens of the request.
        rows: Rows of tokens in a frame; the latent has at least as many rows.
        frames: Latent frames; 1 for an image.
        guidance: The request's guidance scale.
        embedded: Whether the guidance scale is an input of the network, which then has no negative branch.
    """

    model: str
    heads: int | None
    depth: int
    tokens: int
    rows: int
    frames: int
    guidance: float
    embedded: bool


def check_layout(layout: ParallelConfig, shape: ModelShape) -> list[str]:
    """Refuse a layout that cannot run.

    Args:
        layout: The `parallel` group.
        shape: The model shape that it has to fit.

    Returns:
        Notes on options without effect and on padding.

    Raises:
        ValueError: A layout rule is broken; the message has the nearest valid layout.
    """
    _check_branches(layout, shape)
    _check_stale(layout)
    shared = layout.ring * layout.ulysses
    _check_shards(layout)
    _check_frames(layout, shape)
    if shape.heads is None:
        return _unused(layout)
    if shape.heads % layout.tp:
        near = [n for n in range(1, shape.heads + 1) if shape.heads % n == 0]
        best = min(near, key=lambda n: abs(n - layout.tp))
        raise ValueError(
            f"parallel.tp={layout.tp} does not divide the {shape.heads} attention heads of model={shape.model}; the "
            f"nearest that does is parallel.tp={best}"
        )
    heads = shape.heads // layout.tp
    if layout.ulysses > heads:
        raise ValueError(
            f"parallel.ulysses={layout.ulysses} is more than the {heads} attention heads a rank has; use "
            f"parallel.ulysses={heads} or fewer, and parallel.ring for the rest"
        )
    if shared > shape.tokens:
        raise ValueError(
            f"parallel.ring x parallel.ulysses = {shared} ranks for {shape.tokens} image tokens; use {shape.tokens} "
            "ranks or fewer, or a larger image"
        )
    _check_pipe(layout, shape)
    _check_rows(layout, shape)
    return _unused(layout) + _waste(layout, shape.tokens, heads)


def needs_lse(layout: ParallelConfig) -> bool:
    """Return whether attention merges parts by their log-sum-exp: an exact ring does, a displaced one does not."""
    return layout.ring > 1 and not layout.displaced


def is_approximate(layout: ParallelConfig) -> bool:
    """Return whether one evaluation of an image reuses results of the one before, which makes it approximate."""
    return layout.displaced or layout.pipe > 1


def _check_branches(layout: ParallelConfig, shape: ModelShape) -> None:
    if layout.cfg == 2 and shape.embedded:
        raise ValueError(
            f"parallel.cfg=2, but model={shape.model} takes its guidance scale as an input and has one branch; use "
            "parallel.cfg=1"
        )
    if layout.cfg == 2 and shape.guidance == 1:
        raise ValueError(
            "parallel.cfg=2 needs guidance, and request.guidance=1 is none; use another scale, or parallel.cfg=1"
        )


def _check_stale(layout: ParallelConfig) -> None:
    if layout.displaced and layout.ring == 1:
        raise ValueError(
            "parallel.displaced=true uses keys and values of parallel.ring's other ranks, and parallel.ring is 1; use "
            "parallel=displaced2, or displaced=false"
        )


def _check_pipe(layout: ParallelConfig, shape: ModelShape) -> None:
    """Check that every rank of a pipeline has a block, and every patch a token."""
    if layout.pipe == 1:
        return
    if layout.pipe > shape.depth:
        raise ValueError(
            f"parallel.pipe={layout.pipe} is more than the {shape.depth} blocks of model={shape.model}; use "
            f"parallel.pipe={shape.depth} or fewer"
        )
    if (patches := patches_of(layout)) > shape.tokens:
        raise ValueError(
            f"parallel.patches={patches} of {shape.tokens} image tokens; use {shape.tokens} or fewer, or a larger image"
        )


def patches_of(layout: ParallelConfig) -> int:
    """Return the number of patches that pass through a pipeline."""
    return layout.pipe if layout.patches is None else layout.patches


def _check_shards(layout: ParallelConfig) -> None:
    """Check that weights are sharded over the ranks of an image that would hold the same ones."""
    if layout.shard_weights and layout.cfg * layout.ring * layout.ulysses == 1:
        raise ValueError(
            "parallel.shard_weights=true shards weights over parallel.cfg x ring x ulysses, which is one rank; use "
            "parallel=ulysses2 with it, or shard_weights=false"
        )


def _check_rows(layout: ParallelConfig, shape: ModelShape) -> None:
    """Check that every rank of an image has a band of rows to decode."""
    ranks = _replica_ranks(layout)
    if layout.decode is Decode.rows and ranks > shape.rows:
        raise ValueError(
            f"parallel.cfg x tp x pipe x ring x ulysses = {ranks} ranks decode an image of {shape.rows} rows of "
            f"tokens; use {shape.rows} ranks or fewer per image and parallel.dp for the rest, or a higher image"
        )


def _check_frames(layout: ParallelConfig, shape: ModelShape) -> None:
    """Check that every rank has at least as many latent frames to decode as a convolution over time looks back."""
    ranks = _replica_ranks(layout)
    if layout.decode is Decode.rows or ranks == 1:
        return
    if shape.frames == 1:
        raise ValueError("parallel.decode=frames shards a video, and an image is requested; use parallel.decode=rows")
    if shape.frames < TEMPORAL_HALO * ranks:
        raise ValueError(
            f"parallel.decode=frames shards {shape.frames} latent frames over parallel.cfg x tp x ring x ulysses = "
            f"{ranks} ranks, {TEMPORAL_HALO} or more each; use {shape.frames // TEMPORAL_HALO} ranks or fewer, a "
            "longer video, or parallel.decode=rows"
        )


def _replica_ranks(layout: ParallelConfig) -> int:
    """Return the number of ranks that compute one image."""
    return layout.cfg * layout.tp * layout.pipe * layout.ring * layout.ulysses


def _unused(layout: ParallelConfig) -> list[str]:
    """Return notes on options without effect."""
    notes = []
    if layout.warmup > 1 and not is_approximate(layout):
        notes.append(f"parallel.warmup={layout.warmup} has no effect: every evaluation is exact")
    if layout.patches is not None and layout.pipe == 1:
        notes.append(f"parallel.patches={layout.patches} has no effect: there is no pipeline")
    if layout.decode is Decode.frames and _replica_ranks(layout) == 1:
        notes.append("parallel.decode=frames has no effect: one rank decodes an image")
    return notes


def _waste(layout: ParallelConfig, tokens: int, heads: int) -> list[str]:
    """Return notes on padding and idle ranks."""
    shared, notes = layout.ring * layout.ulysses, []
    if (patches := patches_of(layout)) < layout.pipe:
        notes.append(f"{patches} patches in a pipeline of {layout.pipe} ranks: no more than {patches} compute at once")
    if spare := -tokens % shared:
        notes.append(f"{tokens} image tokens over {shared} ranks: {spare} are padding")
    if spare := -heads % layout.ulysses:
        notes.append(f"{heads} attention heads over {layout.ulysses} ulysses ranks: {spare} are padding")
    return notes
