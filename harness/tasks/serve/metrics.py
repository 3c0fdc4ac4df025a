"""What a server says of itself in Prometheus' format, from a registry of its own."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from harness.tasks.serve.jobs import GenerationJob
from harness.tasks.serve.supervisor import Supervisor

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class Live(Collector):
    """What a supervisor knows at the moment.

    Args:
        supervisor: of the ranks.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> Iterator[Metric]:
        """The gauges, and the counters that the engine keeps; they start again with it."""
        engine = self._supervisor
        states = Tally(job.state for job in list(engine.jobs.values()))
        yield GaugeMetricFamily("triptych_ready", "1 while ranks are warm", float(engine.state == "ready"))
        yield GaugeMetricFamily("triptych_queued", "requests that wait", states["queued"])
        yield GaugeMetricFamily("triptych_running", "requests that are being drawn", states["running"])
        yield CounterMetricFamily("triptych_restarts", "restarts of the ranks", engine.restarts)
        if engine.info is not None:
            yield GaugeMetricFamily("triptych_ranks", "processes of the engine", engine.info.world_size)
            yield CounterMetricFamily("triptych_evaluations", "forwards of the denoiser", engine.info.evaluations)
            yield CounterMetricFamily("triptych_rows", "what those forwards carried", engine.info.rows)


class Meter:
    """Counts requests by outcome and their times.

    Args:
        supervisor: whose state is read whenever somebody asks.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._registry = prometheus.CollectorRegistry()
        self._outcomes = prometheus.Counter(
            "triptych_requests", "requests by outcome", ["outcome"], registry=self._registry
        )
        self._latency = prometheus.Histogram(
            "triptych_latency_seconds", "from arrival to the saved picture", buckets=SECONDS, registry=self._registry
        )
        self._waited = prometheus.Histogram(
            "triptych_queue_seconds", "from arrival to the first stage", buckets=SECONDS, registry=self._registry
        )
        self._registry.register(Live(supervisor))

    def count(self, outcome: str) -> None:
        """One request more that ended so."""
        self._outcomes.labels(outcome).inc()

    def measure(self, job: GenerationJob) -> None:
        """The times of a request that was drawn."""
        if job.began is not None and job.ended is not None:
            self._waited.observe(job.began - job.arrived)
            self._latency.observe(job.ended - job.arrived)

    def text(self) -> bytes:
        """The exposition."""
        return prometheus.generate_latest(self._registry)
