"""The server's metrics in Prometheus' format, in a registry of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from harness.tasks.serve.jobs import GenerationJob
from harness.tasks.serve.supervisor import Supervisor

BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class SupervisorCollector(Collector):
    """The current state of a supervisor, read at every scrape.

    Args:
        supervisor: The supervisor of the ranks.
        is_ready: The function that returns whether the server takes requests, as /ready does.
    """

    def __init__(self, supervisor: Supervisor, is_ready: Callable[[], bool]) -> None:
        self._supervisor = supervisor
        self._is_ready = is_ready

    def collect(self) -> Iterator[Metric]:
        """Collect the gauges, and the engine's counters, which restart from 0 with the engine.

        Yields:
            One metric after another.
        """
        supervisor = self._supervisor
        states = Counter(job.state for job in list(supervisor.jobs.values()))
        yield GaugeMetricFamily("triptych_ready", "1 while /ready answers 200", float(self._is_ready()))
        yield GaugeMetricFamily("triptych_queued", "requests in the queue", states["queued"])
        yield GaugeMetricFamily("triptych_running", "requests that are running", states["running"])
        yield CounterMetricFamily("triptych_restarts", "restarts of the ranks", supervisor.restarts)
        if supervisor.info is not None:
            yield GaugeMetricFamily("triptych_ranks", "processes of the engine", supervisor.info.world_size)
            yield CounterMetricFamily("triptych_evaluations", "forwards of the denoiser", supervisor.info.evaluations)
            yield CounterMetricFamily("triptych_rows", "batch rows of those forwards", supervisor.info.rows)


class RequestMetrics:
    """Counters of requests by outcome, and histograms of their times.

    Args:
        supervisor: The supervisor whose state is read at every scrape.
        is_ready: The function that returns whether the server takes requests.
    """

    def __init__(self, supervisor: Supervisor, is_ready: Callable[[], bool]) -> None:
        self._registry = prometheus.CollectorRegistry()
        self._outcomes = prometheus.Counter(
            "triptych_requests", "requests by outcome", ["outcome"], registry=self._registry
        )
        self._latency = prometheus.Histogram(
            "triptych_latency_seconds",
            "time from arrival to the engine's answer",
            buckets=BUCKETS_S,
            registry=self._registry,
        )
        self._queue_time = prometheus.Histogram(
            "triptych_queue_seconds", "time from arrival to the first stage", buckets=BUCKETS_S, registry=self._registry
        )
        self._registry.register(SupervisorCollector(supervisor, is_ready))

    def count(self, outcome: str) -> None:
        """Count one more request with this outcome."""
        self._outcomes.labels(outcome).inc()

    def observe_times(self, job: GenerationJob) -> None:
        """Add the times of a job that is done to the histograms."""
        if job.began is not None and job.ended is not None:
            self._queue_time.observe(job.began - job.arrived)
            self._latency.observe(job.ended - job.arrived)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return prometheus.generate_latest(self._registry)
