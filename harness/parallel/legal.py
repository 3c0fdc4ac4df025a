"""Which layouts a network and a request can have, asked before any process starts and without torch."""

from __future__ import annotations

from dataclasses import dataclass

from harness.config.schema import Decode, ParallelConfig

REACH = 2
"""Latent frames that a rank needs where a video is decoded by frames: as many as a convolution over time looks back."""


@dataclass(frozen=True)
class Facts:
    """What a layout has to fit.

    Args:
        model: name, for messages.
        heads: attention heads of the network; None where tokens and heads cannot be cut (a UNet).
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
    tokens: int
    rows: int
    frames: int
    guidance: float
    embedded: bool
    returns_lse: bool
    backend: str


def check_layout(layout: ParallelConfig, facts: Facts) -> list[str]:
    """Refuses a layout that cannot run; what it wastes, in words.

    Raises:
        ValueError: the rule, and the nearest layout that keeps it.
    """
    _check_branches(layout, facts)
    shared = layout.ring * layout.ulysses
    _check_shards(layout, facts)
    _check_frames(layout, facts)
    if facts.heads is None:
        if layout.tp * shared > 1:
            raise ValueError(
                f"model={facts.model} is a UNet, whose convolutions mix tokens: tp, ring and ulysses cannot cut it; "
                f"use parallel.dp={layout.tp * shared * layout.dp}, or parallel.cfg=2"
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
    if layout.ring > 1 and not facts.returns_lse:
        raise ValueError(
            f"parallel.ring={layout.ring} merges by log-sum-exp, which attention.backend={facts.backend} does not "
            "return; use attention=flash, flex or math"
        )
    _check_rows(layout, facts)
    return _unused(layout) + _waste(layout, facts.tokens, heads)


def _check_branches(layout: ParallelConfig, facts: Facts) -> None:
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


def _check_shards(layout: ParallelConfig, facts: Facts) -> None:
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


def _check_rows(layout: ParallelConfig, facts: Facts) -> None:
    """Every rank that computes a picture decodes a band of its rows."""
    ranks = _of_picture(layout)
    if layout.decode is Decode.rows and ranks > facts.rows:
        raise ValueError(
            f"parallel.cfg x tp x ring x ulysses = {ranks} ranks decode a picture of {facts.rows} rows of tokens; use "
            f"{facts.rows} ranks or fewer a picture and parallel.dp for the rest, or a higher picture"
        )


def _check_frames(layout: ParallelConfig, facts: Facts) -> None:
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
    return layout.cfg * layout.tp * layout.ring * layout.ulysses


def _unused(layout: ParallelConfig) -> list[str]:
    """Options without effect, in words."""
    if layout.decode is Decode.frames and _of_picture(layout) == 1:
        return ["parallel.decode=frames has no effect: one rank decodes a picture"]
    return []


def _waste(layout: ParallelConfig, tokens: int, heads: int) -> list[str]:
    """Padding, in words."""
    shared, notes = layout.ring * layout.ulysses, []
    if spare := -tokens % shared:
        notes.append(f"{tokens} image tokens over {shared} ranks: {spare} are padding")
    if spare := -heads % layout.ulysses:
        notes.append(f"{heads} attention heads over {layout.ulysses} ulysses ranks: {spare} are padding")
    return notes
