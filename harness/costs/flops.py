"""How many operations a rank does in one evaluation of a network, from shapes alone.

With the letters of harness.costs.traffic, T = ring x ulysses, and 2 operations a multiply-add, a rank does

    2 l C_in C_out                    in every linear, over tp where it is cut
    4 (ulysses l) (T l / B) a' E      in every attention over dealt tokens: after the all-to-all a rank has the queries
                                      of its Ulysses group and a' = ceil(A / (tp ulysses)) heads, and meets the keys of
                                      all T ranks, padding included
    4 l S (A / tp) E                  in every attention to S keys that every rank holds whole

and the rest, convolutions among it, whole. Matrix products, convolutions and attention count, as in
harness.device.flops, which counts the same number on ranks that compute.
"""

from __future__ import annotations

from harness.costs.traffic import NetworkTrace


def rank_flops(trace: NetworkTrace, degrees: tuple[int, ...]) -> int:
    """Operations of each rank in one evaluation.

    Args:
        trace: of the network, for the batch that one rank evaluates (with branches apart, that of one branch).
        degrees: of dp, cfg, tp, ring and ulysses (harness.parallel.mesh.AXES).
    """
    tp, shared = degrees[2], degrees[3] * degrees[4]
    linears = sum(
        2 * call.tokens.per_rank(shared) * call.inputs * call.outputs // (tp if call.cut else 1)
        for call in trace.linears
    )
    return linears + attention_flops(trace, degrees) + trace.other_flops


def attention_flops(trace: NetworkTrace, degrees: tuple[int, ...]) -> int:
    """Those of them that are attention."""
    dealt = sharded_attention_flops(trace, degrees)
    tp, shared = degrees[2], degrees[3] * degrees[4]
    return dealt + sum(
        4 * call.queries.per_rank(shared) * call.keys * (call.heads // tp) * call.channels
        for call in trace.local_attention
    )


def sharded_attention_flops(trace: NetworkTrace, degrees: tuple[int, ...]) -> int:
    """Those of them that are attention over dealt tokens, which a ring computes while keys and values travel."""
    _, _, tp, ring, ulysses = degrees
    found = 0
    for call in trace.attention:
        tokens, heads = call.tokens.per_rank(ring * ulysses), -(-(call.heads // tp) // ulysses)
        found += 4 * ulysses * tokens * (ring * ulysses * tokens // call.tokens.batch) * heads * call.channels
    return found
