"""What a server tells Prometheus."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

BUCKETS_S = (
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
)
"""Upper bounds of the latency histogram, in seconds."""

# When a counter began is of no use here, and would double the number of lines.
disable_created_metrics()


class _Versions(Collector):
    """The models that answer, as info; a version that was replaced is gone from it."""

    versions: Mapping[str, str] = {}

    def collect(self) -> list[Metric]:
        family = InfoMetricFamily("dare_model", "Models that answer, by name.", labels=["model"])
        for model, version in self.versions.items():
            family.add_metric([model], {"version": version})
        return [family]


class Metrics:
    """Counters of one server, in a registry of its own; safe from many threads."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.seconds = Histogram(
            "dare_request_seconds",
            "From a request's arrival to the end of its answer.",
            ["route"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.requests = Counter("dare_requests", "Requests, by their answer.", ["route", "status"], registry=registry)
        self.errors = Counter("dare_errors", "Requests that were not answered, by reason.", ["kind"], registry=registry)
        self.in_flight = Gauge("dare_requests_in_flight", "Requests that are not answered yet.", registry=registry)
        self.candidates = Counter("dare_candidates", "Candidates that were scored.", registry=registry)
        self.unknown_items = Counter(
            "dare_candidates_unknown", "Candidates that were scored and whose item is unknown.", registry=registry
        )
        self.without_history = Counter(
            "dare_scores_without_history", "Scored requests of users of whom no behaviour is known.", registry=registry
        )
        self.events = Counter("dare_events_appended", "Events that were new to the store.", registry=registry)
        self.reloads = Counter("dare_reloads", "Models that were asked to load.", ["outcome"], registry=registry)
        self._versions = _Versions()
        registry.register(self._versions)

    def answering(self, versions: Mapping[str, str]) -> None:
        """Say which models answer from now on: name -> version."""
        self._versions.versions = dict(versions)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
