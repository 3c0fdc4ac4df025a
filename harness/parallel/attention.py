"""Attention over tokens that are sharded over ranks: Ulysses, ring, and their product, around any kernel.

Ulysses (Jacobs et al. 2023, arXiv:2309.14509): an all-to-all turns (tokens / U, H heads) into (tokens, H / U heads).
The kernel then runs on whole sequences, and a second all-to-all reverses the first. Ring (Liu et al. 2023,
arXiv:2310.01889): keys and values travel around the ring while the shard at hand is computed, and partial results are
merged by their log-sum-exp. A ring of Ulysses groups is their product (USP, Fang and Zhao 2024, arXiv:2405.07719).
Instead of a ring, keys and values can be gathered at once, or be those of the evaluation before
(harness.parallel.displaced).

Shapes: B batch, l local tokens, L tokens of a group, H heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.parallel.displaced import DisplacedPatches
from harness.parallel.group import Group
from models.attention import AttentionKernel
from models.attention.lse import LseKernel, merge


@dataclass(frozen=True)
class TokenLayout:
    """How the token streams of a block are sharded: each into equal parts, the last one padded.

    Args:
        lengths: tokens of each stream that attention joins, in the order of the concatenation.
        ranks: the number of ranks.
    """

    lengths: tuple[int, ...]
    ranks: int

    def tokens_per_rank(self, length: int) -> int:
        """Return the tokens of a stream on one rank, padding included."""
        return -(-length // self.ranks)

    @property
    def local_lengths(self) -> tuple[int, ...]:
        """The tokens of each stream on one rank, padding included."""
        return tuple(self.tokens_per_rank(length) for length in self.lengths)

    @property
    def padding(self) -> int:
        """The number of padding tokens on all ranks together."""
        return sum(self.local_lengths) * self.ranks - sum(self.lengths)

    def for_tokens(self, local: int) -> TokenLayout:
        """Return the layout of an attention call, which joins all streams or attends within one of them.

        If several streams have that local length, it is the last one: the image, which also attends to itself.

        Args:
            local: the local tokens of the call.

        Returns:
            The layout of the streams in the call.

        Raises:
            ValueError: if no stream, nor all of them, have that many local tokens.
        """
        if local == sum(self.local_lengths):
            return self
        for length in reversed(self.lengths):
            if self.tokens_per_rank(length) == local:
                return TokenLayout((length,), self.ranks)
        raise ValueError(f"attention over {local} local tokens, where the block's streams have {self.local_lengths}")

    def mask(self, mask_BS: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        """Build the key mask of the whole concatenation, in the order of ranks, with padding masked out.

        Args:
            mask_BS: the mask of the concatenation without padding, true for real tokens; None if all are real.
            batch: B.
            device: the device of the mask.

        Returns:
            The mask (B, L); None if every key takes part.
        """
        positions = _token_positions(self).to(device)
        real = positions >= 0
        if mask_BS is None:
            return None if self.padding == 0 else real[None].expand(batch, -1)
        return mask_BS[:, positions.clamp(min=0)] & real


@lru_cache(maxsize=16)
def _token_positions(layout: TokenLayout) -> Tensor:
    """Return the position of every token of all ranks in the whole concatenation; -1 for padding.

    Cached, because every block needs it at every step.
    """
    starts = torch.tensor([0, *layout.lengths[:-1]]).cumsum(0)
    rows = []
    for rank in range(layout.ranks):
        for start, length, local_length in zip(starts.tolist(), layout.lengths, layout.local_lengths, strict=True):
            position = torch.arange(local_length) + rank * local_length
            rows.append(torch.where(position < length, position + start, -1))
    return torch.cat(rows)


@dataclass
class SequenceState:
    """The layout of the blocks that run now. The runner that shards tokens sets it; attention reads it.

    Args:
        layout: the layout; None outside of sharded blocks.
        index: this rank's index among the ranks that share the tokens.
    """

    layout: TokenLayout | None = None
    index: int = 0


class SequenceAttention:
    """An attention kernel over sharded tokens, equal to `kernel` on all of them.

    Args:
        kernel: the kernel for whole sequences; used if the ring has one rank.
        ring_kernel: a kernel that also returns the log-sum-exp; None if the ring has one rank.
        ulysses: the ranks that share heads.
        ring: the ranks that pass keys and values on.
        tokens: the ranks that share tokens: ring x ulysses, ulysses innermost.
        state: how the tokens at hand are sharded.
        gather: whether to all-gather keys and values over the ring instead of passing them on.
        displaced: the stale keys and values of the ring, if those are used instead.
    """

    def __init__(
        self,
        kernel: AttentionKernel,
        ring_kernel: LseKernel | None,
        ulysses: Group,
        ring: Group,
        tokens: Group,
        state: SequenceState,
        gather: bool = False,
        displaced: DisplacedPatches | None = None,
    ) -> None:
        self.kernel = kernel
        self.ring_kernel = ring_kernel
        self.ulysses = ulysses
        self.ring = ring
        self.tokens = tokens
        self.state = state
        self.gather = gather
        self.displaced = displaced

    def __call__(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Attend from this rank's queries to all tokens.

        Args:
            q_BlHD: this rank's queries.
            k_BlHD: this rank's keys.
            v_BlHD: this rank's values.
            mask_BS: true for real keys, of all tokens or of this rank's; None if all are real.

        Returns:
            The output of this rank's queries, (B, l, H, D).
        """
        if self.state.layout is None:
            return self.kernel(q_BlHD, k_BlHD, v_BlHD, mask_BS)
        layout = self.state.layout.for_tokens(k_BlHD.shape[1])
        if mask_BS is not None and mask_BS.shape[1] == k_BlHD.shape[1]:  # sharded like the tokens
            gathered_BJ = self.tokens.all_gather(mask_BS).transpose(0, 1).flatten(1, 2)
            real_BJ = layout.mask(None, len(q_BlHD), q_BlHD.device)
            mask_BS = gathered_BJ if real_BJ is None else gathered_BJ & real_BJ
        else:
            mask_BS = layout.mask(mask_BS, len(q_BlHD), q_BlHD.device)
        heads = q_BlHD.shape[2]
        spare = -heads % self.ulysses.size
        q, k, v = (self._to_heads(F.pad(x, (0, 0, 0, spare))) for x in (q_BlHD, k_BlHD, v_BlHD))
        return self._to_tokens(self._attend_over_ring(layout, q, k, v, mask_BS))[:, :, :heads]

    def _to_heads(self, x_BlHD: Tensor) -> Tensor:
        """Turn (B, l, H, D) of every rank into (B, U l, H / U, D)."""
        if self.ulysses.size == 1:
            return x_BlHD
        x_UBlhD = x_BlHD.unflatten(2, (self.ulysses.size, -1)).permute(2, 0, 1, 3, 4)
        return self.ulysses.all_to_all(x_UBlhD).transpose(0, 1).flatten(1, 2)

    def _to_tokens(self, x_BLhD: Tensor) -> Tensor:
        """Turn (B, U l, H / U, D) of every rank into (B, l, H, D)."""
        if self.ulysses.size == 1:
            return x_BLhD
        x_UBlhD = x_BLhD.unflatten(1, (self.ulysses.size, -1)).transpose(0, 1)
        return self.ulysses.all_to_all(x_UBlhD).permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _attend_over_ring(self, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Compute the attention of this rank's queries to the keys of the whole ring."""
        if self.displaced is not None:
            return self.kernel(q, *self.displaced.gather_kv((self, layout), k, v), mask_BS)
        if self.ring.size == 1 or self.gather:
            return self.kernel(q, _gather_ring(self.ring, k), _gather_ring(self.ring, v), mask_BS)
        if self.ring_kernel is None:
            raise ValueError("a ring needs a kernel that returns log-sum-exp")
        chunks = [None] * self.ring.size if mask_BS is None else list(mask_BS.chunk(self.ring.size, dim=1))
        packed, merged = torch.stack([k, v]), None
        for turn in range(self.ring.size):
            last = turn == self.ring.size - 1
            next_packed = None if last else self.ring.shift(packed)
            partial = self.ring_kernel(q, packed[0], packed[1], chunks[(self.ring.index - turn) % self.ring.size])
            merged = partial if merged is None else merge(*merged, *partial)
            packed = packed if next_packed is None else next_packed()
        assert merged is not None
        return merged[0].to(q.dtype)


def _gather_ring(ring: Group, x_BLHD: Tensor) -> Tensor:
    return ring.all_gather(x_BLHD).transpose(0, 1).flatten(1, 2) if ring.size > 1 else x_BLHD
