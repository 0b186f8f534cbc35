"""What the server counts, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
disable_created_metrics()
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """A registry of its own: servers in one process do not share counts."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        component = ("model", "component")
        self.requests = Counter(
            "edgemm_requests", "Answered requests.", ("model", "protocol", "status"), registry=registry
        )
        self.latency = Histogram(
            "edgemm_request_seconds",
            "From when a row was accepted until its tensors were there.",
            ("model", "signature"),
            buckets=SECONDS,
            registry=registry,
        )
        self.queue = Histogram(
            "edgemm_queue_seconds", "A task's wait for its batch.", component, buckets=SECONDS, registry=registry
        )
        self.compute = Histogram(
            "edgemm_compute_seconds", "One batch in its component.", component, buckets=SECONDS, registry=registry
        )
        self.batch = Histogram("edgemm_batch_size", "Rows of a batch.", component, buckets=SIZES, registry=registry)
        self.rows = Counter(
            "edgemm_batch_rows",
            "Rows in batches, by the modalities of the request that asked first.",
            (*component, "signature"),
            registry=registry,
        )
        self.elements = Counter(
            "edgemm_input_elements", "Elements of the tensors that components read.", component, registry=registry
        )
        self.padding = Counter(
            "edgemm_padding_elements", "Those of them that are padding: waste.", component, registry=registry
        )
        self.cache = Counter(
            "edgemm_cache",
            "Rows of a component by where they came from: hit (kept), in_flight (shared), miss (computed).",
            (*component, "result"),
            registry=registry,
        )
        self.rejects = Counter(
            "edgemm_rejected", "Rows that were not answered, by reason.", ("model", "reason"), registry=registry
        )
        self.waiting = Gauge("edgemm_pending", "Rows that wait or run.", registry=registry)
        self.kept = Gauge("edgemm_cache_bytes", "Size of what is kept.", registry=registry)
        self.loads = Counter("edgemm_loads", "Bundles loaded, or not.", ("model", "result"), registry=registry)
