"""Which layouts a network and a request can have, asked before any process starts and without torch."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.schema import Decode, ParallelConfig
from harness.parallel.mesh import REACH


@dataclass(frozen=True)
class ModelShape:
    """What a layout has to fit.

    Args:
        model: name, for messages.
        heads: attention heads of the network; None where tokens and heads cannot be cut (a UNet).
        depth: its blocks, of its first kind where it has several.
        tokens: image tokens of the request.
        rows: of tokens in a frame; the latent has at least as many.
        frames: of the latent; a picture has one.
        guidance: of the request.
        embedded: the network is told its guidance scale and has no negative branch.
        returns_lse: whether the attention backend returns the log-sum-exp that a ring merges.
        backend: its name.
    """

    model: str
    heads: int | None
    depth: int
    tokens: int
    rows: int
    frames: int
    guidance: float
    embedded: bool
    returns_lse: bool
    backend: str


def check_layout(layout: ParallelConfig, facts: ModelShape) -> list[str]:
    """Refuses a layout that cannot run; what it wastes, in words.

    Raises:
        ValueError: the rule, and the nearest layout that keeps it.
    """
    _check_branches(layout, facts)
    _check_stale(layout)
    shared = layout.ring * layout.ulysses
    _check_shards(layout, facts)
    _check_frames(layout, facts)
    if facts.heads is None:
        if layout.tp * shared * layout.pipe > 1:
            raise ValueError(
                f"model={facts.model} is a UNet, whose convolutions mix tokens: tp, pipe, ring and ulysses cannot cut "
                f"it; use parallel.dp={layout.tp * layout.pipe * shared * layout.dp}, or parallel.cfg=2"
            )
        return _unused(layout)
    if facts.heads % layout.tp:
        near = [n for n in range(1, facts.heads + 1) if facts.heads % n == 0]
        best = min(near, key=lambda n: abs(n - layout.tp))
        raise ValueError(
            f"parallel.tp={layout.tp} does not divide the {facts.heads} attention heads of model={facts.model}; the "
            f"nearest that does is parallel.tp={best}"
        )
    heads = facts.heads // layout.tp
    if layout.ulysses > heads:
        raise ValueError(
            f"parallel.ulysses={layout.ulysses} is more than the {heads} attention heads a rank has; use "
            f"parallel.ulysses={heads} or fewer, and parallel.ring for the rest"
        )
    if shared > facts.tokens:
        raise ValueError(
            f"parallel.ring x parallel.ulysses = {shared} ranks for {facts.tokens} image tokens; use {facts.tokens} "
            "ranks or fewer, or a larger picture"
        )
    if needs_lse(layout) and not facts.returns_lse:
        raise ValueError(
            f"parallel.ring={layout.ring} merges by log-sum-exp, which attention.backend={facts.backend} does not "
            "return; use attention=flash, flex or math"
        )
    _check_pipe(layout, facts)
    _check_rows(layout, facts)
    return _unused(layout) + _waste(layout, facts.tokens, heads)


def needs_lse(layout: ParallelConfig) -> bool:
    """Whether attention merges parts by their log-sum-exp: what a ring passes on, and not what it keeps."""
    return layout.ring > 1 and not layout.displaced


def is_approximate(layout: ParallelConfig) -> bool:
    """Whether something is kept of one evaluation of a picture for the next, which is then approximate."""
    return layout.displaced or layout.pipe > 1


def _check_branches(layout: ParallelConfig, facts: ModelShape) -> None:
    if layout.cfg not in (1, 2):
        raise ValueError(f"parallel.cfg={layout.cfg}; guidance has two branches: use 1 or 2")
    if layout.cfg == 2 and facts.embedded:
        raise ValueError(
            f"parallel.cfg=2, but model={facts.model} is told its guidance scale and has one branch; use parallel.cfg=1"
        )
    if layout.cfg == 2 and facts.guidance == 1:
        raise ValueError(
            "parallel.cfg=2 needs guidance, and request.guidance=1 is none; ask for another, or use parallel.cfg=1"
        )


def _check_stale(layout: ParallelConfig) -> None:
    if layout.warmup < 1:
        raise ValueError(
            f"parallel.warmup={layout.warmup}; the first evaluation of a picture has none before it to take keys and "
            "values of: give at least 1"
        )
    if layout.patches is not None and layout.patches < 1:
        raise ValueError(f"parallel.patches={layout.patches}; give at least 1, or null for as many as ranks")
    if layout.displaced and layout.ring == 1:
        raise ValueError(
            "parallel.displaced=true takes keys and values of parallel.ring's other ranks, which is one rank; use "
            "parallel=displaced2, or displaced=false"
        )


def _check_pipe(layout: ParallelConfig, facts: ModelShape) -> None:
    """Every rank of a pipeline has a block, every patch a token, and nothing else cuts a block."""
    if layout.pipe == 1:
        return
    if layout.tp * layout.ring * layout.ulysses > 1 or layout.shard_weights:
        raise ValueError(
            f"parallel.pipe={layout.pipe} goes with parallel.dp and parallel.cfg alone; leave out tp, ring, ulysses, "
            "displaced and shard_weights, or use parallel.pipe=1"
        )
    if layout.pipe > facts.depth:
        raise ValueError(
            f"parallel.pipe={layout.pipe} is more than the {facts.depth} blocks of model={facts.model}; use "
            f"parallel.pipe={facts.depth} or fewer"
        )
    if (patches := patches_of(layout)) > facts.tokens:
        raise ValueError(
            f"parallel.patches={patches} of {facts.tokens} image tokens; use {facts.tokens} or fewer, or a larger "
            "picture"
        )


def patches_of(layout: ParallelConfig) -> int:
    """Patches that go through a pipeline."""
    return layout.pipe if layout.patches is None else layout.patches


def _check_shards(layout: ParallelConfig, facts: ModelShape) -> None:
    """Weights are dealt over the ranks of a picture that would hold the same ones."""
    if not layout.shard_weights:
        return
    if facts.heads is None:
        raise ValueError(f"parallel.shard_weights=true deals equal blocks, which model={facts.model}, a UNet, has not")
    if layout.cfg * layout.ring * layout.ulysses == 1:
        raise ValueError(
            "parallel.shard_weights=true deals weights over parallel.cfg x ring x ulysses, which is one rank; use "
            "parallel=ulysses2 with it, or shard_weights=false"
        )


def _check_rows(layout: ParallelConfig, facts: ModelShape) -> None:
    """Every rank that computes a picture decodes a band of its rows."""
    ranks = _of_picture(layout)
    if layout.decode is Decode.rows and ranks > facts.rows:
        raise ValueError(
            f"parallel.cfg x tp x pipe x ring x ulysses = {ranks} ranks decode a picture of {facts.rows} rows of "
            f"tokens; use {facts.rows} ranks or fewer a picture and parallel.dp for the rest, or a higher picture"
        )


def _check_frames(layout: ParallelConfig, facts: ModelShape) -> None:
    """Or decodes as many latent frames of a video as a convolution over time looks back, or more."""
    ranks = _of_picture(layout)
    if layout.decode is Decode.rows or ranks == 1:
        return
    if facts.frames == 1:
        raise ValueError("parallel.decode=frames deals a video, and a picture is asked for; use parallel.decode=rows")
    if facts.frames < REACH * ranks:
        raise ValueError(
            f"parallel.decode=frames deals {facts.frames} latent frames over parallel.cfg x tp x ring x ulysses = "
            f"{ranks} ranks, {REACH} or more each; use {facts.frames // REACH} ranks or fewer, a longer video, or "
            "parallel.decode=rows"
        )


def _of_picture(layout: ParallelConfig) -> int:
    """The ranks that compute one picture."""
    return layout.cfg * layout.tp * layout.pipe * layout.ring * layout.ulysses


def _unused(layout: ParallelConfig) -> list[str]:
    """Options without effect, in words."""
    notes = []
    if layout.warmup > 1 and not is_approximate(layout):
        notes.append(f"parallel.warmup={layout.warmup} has no effect: every evaluation is exact")
    if layout.patches is not None and layout.pipe == 1:
        notes.append(f"parallel.patches={layout.patches} has no effect: there is no pipeline")
    if layout.decode is Decode.frames and _of_picture(layout) == 1:
        notes.append("parallel.decode=frames has no effect: one rank decodes a picture")
    return notes


def _waste(layout: ParallelConfig, tokens: int, heads: int) -> list[str]:
    """Padding, in words."""
    shared, notes = layout.ring * layout.ulysses, []
    if (patches := patches_of(layout)) < layout.pipe:
        notes.append(f"{patches} patches in a pipeline of {layout.pipe} ranks: no more than {patches} compute at once")
    if spare := -tokens % shared:
        notes.append(f"{tokens} image tokens over {shared} ranks: {spare} are padding")
    if spare := -heads % layout.ulysses:
        notes.append(f"{heads} attention heads over {layout.ulysses} ulysses ranks: {spare} are padding")
    return notes
