"""Counts as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["text"]

COUNTERS = {
    "full_steps": "Steps that computed every layer",
    "cached_steps": "Steps that used cached features",
    "full_calls": "Calls of the model that computed every layer",
    "partial_calls": "Of the full calls those that computed a part of the batch alone",
    "cached_calls": "Calls of the model that used cached features",
    "refused_calls": "Calls that could not be told apart and ran in full",
    "evictions": "Times that a session's state was freed for another one's",
}
GAUGES = {
    "sessions": "Sessions that are known",
    "state_bytes": "Bytes of feature state",
    "graphs": "Graphs that are compiled or loaded",
}


@dataclass(frozen=True, eq=False)  # a registry hashes it
class _Replicas(Collector):
    replicas: Sequence[Mapping[str, Any]]
    answers: Mapping[int, int]

    def collect(self) -> Iterator[Metric]:
        for kind, names in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
            for name, help in names.items():
                family = kind(f"hero_fx_{name}", help, labels=("replica", "task"))
                for of in self.replicas:
                    for task, stats in of["tasks"].items():
                        family.add_metric((of["replica"], task), stats[name])
                yield family
        requests = CounterMetricFamily("world_requests", "Requests that ended", labels=("replica", "outcome"))
        live = GaugeMetricFamily("world_live_requests", "Requests that run", labels=("replica",))
        for of in self.replicas:
            for outcome in ("done", "cancelled", "failed"):
                requests.add_metric((of["replica"], outcome), of["requests"][outcome])
            live.add_metric((of["replica"],), of["requests"]["live"])
        answers = CounterMetricFamily("world_answers", "HTTP answers to requests", labels=("status",))
        for status, count in self.answers.items():
            answers.add_metric((str(status),), count)
        yield from (requests, live, answers)


def text(replicas: Sequence[Mapping[str, Any]], answers: Mapping[int, int]) -> bytes:
    """In the text format of Prometheus: `replicas` as `Engine.stats()` has them, with a name; `answers` by status."""
    registry = CollectorRegistry()
    registry.register(_Replicas(replicas, answers))
    return generate_latest(registry)
