"""Displaced patch parallelism: keys and values of the other ranks are those of the evaluation before.

The fresh ones travel while everything else of an evaluation is computed. With K_r^n the keys and values of rank r's
tokens in evaluation n of N ranks, the queries of rank r attend to

    K_0^(n-1) ... K_r^n ... K_(N-1)^(n-1)        and in the first `warmup` evaluations to all of K^n

Source: DistriFusion (Li et al. 2024, arXiv:2402.19481), for transformers as the comparison in PipeFusion
(Fang et al. 2024, arXiv:2405.14430) describes it. Here the ranks of a ring do so, and each Ulysses group stays exact.
The text of a joint attention is sharded as the network's plan says, and is as stale as the image.

Shapes: B batch, l tokens of one ring index, S = N l of all, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from harness.parallel.group import Group
from harness.parallel.stale_kv import StaleKVCache


class DisplacedPatches(StaleKVCache):
    """The keys and values of the ring that every attention of a network stores.

    Args:
        ring: the ranks that exchange keys and values.
        warmup: the exact evaluations at the start of a micro-batch.
    """

    method = "displaced patches"

    def __init__(self, ring: Group, warmup: int) -> None:
        super().__init__(warmup)
        self.ring = ring
        self._pending: dict[Hashable, Callable[[], Tensor]] = {}

    def gather_kv(self, call: Hashable, k_BlHD: Tensor, v_BlHD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the whole ring: this rank's are fresh, the others' exact or stale.

        Args:
            call: the number of this attention in the network.
            k_BlHD: this rank's keys.
            v_BlHD: this rank's values.

        Returns:
            Keys and values, each (B, S, H, D).
        """
        local = torch.stack([k_BlHD, v_BlHD])
        previous, pending = self._pending.pop(call, None), self.ring.start_all_gather(local)
        if previous is None:
            self.cached_bytes += local.nbytes * self.ring.size
        if self.is_exact or previous is None:
            gathered = pending()
            self._pending[call] = lambda: gathered
        else:
            gathered = previous()
            gathered[self.ring.index] = local
            self._pending[call] = pending
        k_BSHD, v_BSHD = gathered.movedim(0, 2).flatten(2, 3).unbind(0)
        return k_BSHD, v_BSHD

    def _release(self) -> None:
        for pending in self._pending.values():
            pending()
        self._pending.clear()
