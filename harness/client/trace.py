"""Merging the traces of the ranks into one file that Perfetto and Chrome open."""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence

from harness.messages import RankReport

HEAD, TAIL = b'{"displayTimeUnit": "ms", "traceEvents": [\n', b"\n]}\n"


def merge_traces(ranks: Sequence[RankReport]) -> bytes:
    """Return the traces of some ranks as one Chrome trace, compressed with gzip.

    Each rank is a process of the trace. Their clocks are those of their machines.

    Args:
        ranks: the reports of a traced request.

    Returns:
        The content of the file.

    Raises:
        ValueError: a rank has no trace.
    """
    missing = [report.rank for report in ranks if not report.trace]
    if missing:
        raise ValueError(f"rank {missing[0]} left no trace; ask for one with generate(trace=True)")
    merged = io.BytesIO()
    with gzip.GzipFile(fileobj=merged, mode="wb", mtime=0) as file:
        for number, report in enumerate(ranks):
            file.write(b",\n" if number else HEAD)
            file.write(gzip.decompress(report.trace))
        file.write(TAIL)
    return merged.getvalue()
