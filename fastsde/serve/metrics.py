"""What Prometheus reads of a sampler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from fastsde.live import RequestQueue

_CALLS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 500, 1000)


class SamplerCollector(Collector):
    """The numbers of `SamplerStats` at the time they are asked for."""

    def __init__(self, sampler: RequestQueue) -> None:
        self.sampler = sampler

    def collect(self) -> Iterator[Any]:
        """The metrics."""
        stats = self.sampler.stats()
        yield GaugeMetricFamily("fastsde_waiting_samples", "Samples in the queue.", stats.waiting)
        yield GaugeMetricFamily("fastsde_running_samples", "Samples in slots.", stats.running)
        yield GaugeMetricFamily("fastsde_slots", "Slots.", self.sampler.batch_size)
        yield GaugeMetricFamily("fastsde_queue_samples", "Samples that may wait.", self.sampler.max_waiting)
        yield CounterMetricFamily("fastsde_turns", "Turns of the engine.", stats.turns)
        yield CounterMetricFamily("fastsde_rows", "Rows that were evaluated.", stats.rows)
        yield CounterMetricFamily("fastsde_needed_rows", "Rows of these that a sample needed.", stats.needed)
        requests = CounterMetricFamily("fastsde_requests", "Requests that have ended.", labels=["outcome"])
        for outcome in ("finished", "cancelled", "failed"):
            requests.add_metric([outcome], stats.requests.get(outcome, 0))
        yield requests
        edges = [(str(edge), sum(k for calls, k in stats.nfe.items() if calls <= edge)) for edge in _CALLS]
        total = sum(calls * k for calls, k in stats.nfe.items())
        yield HistogramMetricFamily(
            "fastsde_calls",
            "Network calls of samples that have ended.",
            buckets=[*edges, ("+Inf", stats.finished)],
            sum_value=total,
        )
