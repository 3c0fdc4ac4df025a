"""Operations of one rank in one evaluation of a network, from shapes alone.

With the letters of harness.costs.traffic, T = ring x ulysses, and 2 operations per multiply-add, a rank computes

    2 l C_in C_out                    in every linear, divided by tp if the linear is sharded
    4 (ulysses l) (T l / B) a' E      in every attention over sharded tokens: after the all-to-all a rank has the
                                      queries of its Ulysses group and a' = ceil(A / (tp ulysses)) heads, and attends
                                      to the keys of all T ranks, padding included
    4 l S (A / tp) E                  in every attention to S keys that are replicated on every rank

and everything else, including convolutions, in full. Matrix products, convolutions and attention count, as in
harness.device.flops, which counts the same number on real ranks.
"""

from __future__ import annotations

from harness.costs.traffic import NetworkTrace


def rank_flops(trace: NetworkTrace, degrees: tuple[int, ...]) -> int:
    """Return the operations of each rank in one evaluation.

    Args:
        trace: the network's trace for the batch that one rank evaluates (one branch if cfg = 2).
        degrees: the degrees of dp, cfg, tp, ring and ulysses (harness.parallel.mesh.AXES).
    """
    tp, sp = degrees[2], degrees[3] * degrees[4]
    linears = sum(
        2 * call.tokens.per_rank(sp) * call.inputs * call.outputs // (tp if call.sharded_dim else 1)
        for call in trace.linears
    )
    return linears + attention_flops(trace, degrees) + trace.other_flops


def attention_flops(trace: NetworkTrace, degrees: tuple[int, ...]) -> int:
    """Return the operations that are attention."""
    sharded = sharded_attention_flops(trace, degrees)
    tp, sp = degrees[2], degrees[3] * degrees[4]
    return sharded + sum(
        4 * call.queries.per_rank(sp) * call.keys * (call.heads // tp) * call.channels for call in trace.local_attention
    )


def sharded_attention_flops(trace: NetworkTrace, degrees: tuple[int, ...]) -> int:
    """Return the operations of attention over sharded tokens, which a ring overlaps with sending keys and values."""
    _, _, tp, ring, ulysses = degrees
    flops = 0
    for call in trace.attention:
        tokens, heads = call.tokens.per_rank(ring * ulysses), -(-(call.heads // tp) // ulysses)
        flops += 4 * ulysses * tokens * (ring * ulysses * tokens // call.tokens.batch) * heads * call.channels
    return flops
