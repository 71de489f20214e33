"""What Prometheus is told."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dsjax.inference.engine import Engine
from dsjax.inference.request import Request

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
_EACH = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)


class Metrics:
    """Counts what happens; reads of the engine what that counts itself."""

    def __init__(self, engine: Engine):
        """Begins at zero, with a registry of its own."""
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        of = {"registry": self._registry}
        self._responses = Counter("dsjax_http_responses", "Responses.", ["path", "status"], **of)
        self._finished = Counter("dsjax_requests_finished", "Answers that have ended, by the reason.", ["finish"], **of)
        self._first = Histogram("dsjax_time_to_first_token_seconds", "From submission.", buckets=_FIRST, **of)
        self._each = Histogram("dsjax_time_per_output_token_seconds", "Behind the first.", buckets=_EACH, **of)
        self._whole = Histogram("dsjax_request_seconds", "From submission to the end.", buckets=_WHOLE, **of)

    def responded(self, path: str, status: int) -> None:
        """Count a response of HTTP."""
        self._responses.labels(path, str(status)).inc()

    def ended(self, request: Request) -> None:
        """Count an answer."""
        self._finished.labels(request.finish).inc()
        self._whole.observe(time.monotonic() - request.submitted)
        if times := request.times:
            self._first.observe(times[0] - request.submitted)
        if len(times) > 1:
            self._each.observe((times[-1] - times[0]) / (len(times) - 1))

    def text(self) -> bytes:
        """Return everything in Prometheus' format."""
        return generate_latest(self._registry)


class EngineCollector(Collector):
    """Reads an engine's own counts when they are asked for."""

    def __init__(self, engine: Engine):
        """Reads this engine."""
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield every value."""
        engine = self._engine
        gauges = {
            "dsjax_requests_running": ("Requests that have a slot.", engine.running),
            "dsjax_requests_waiting": ("Requests that have none yet.", engine.waiting),
            "dsjax_slots": ("Requests that can have a slot.", engine.slots),
            "dsjax_pages_held": ("Pages of the cache that requests have.", engine.pages_held),
            "dsjax_pages_idle": ("Pages that the prefix cache keeps for nobody in particular.", engine.pages_idle),
            "dsjax_pages": ("Pages of the cache.", engine.pages),
            "dsjax_prefix_cache_hit_rate": (
                "Share of prompt tokens that the prefix cache had.",
                engine.prefix.hit_rate,
            ),
        }
        counters = {
            "dsjax_prompt_tokens": ("Tokens of prompts.", engine.prefix.asked),
            "dsjax_prompt_tokens_cached": ("Of these, tokens that the prefix cache had.", engine.prefix.found),
            "dsjax_answer_tokens": ("Tokens of answers.", engine.counts.tokens),
            "dsjax_engine_steps": ("Steps of the engine.", engine.counts.steps),
            "dsjax_drafts": ("Tokens that MTP modules drafted and the model read.", engine.counts.drafted),
            "dsjax_drafts_accepted": ("Of these, those that the model chose too.", engine.counts.accepted),
            "dsjax_preemptions": ("Requests that gave their pages to older ones.", engine.counts.preemptions),
        }
        if engine.rebalancer is not None:
            what = "Load of the fullest device over the mean, of the worst layer, by the loads seen of late."
            gauges["dsjax_expert_imbalance"] = what, float(engine.rebalancer.imbalance().max())
            counters["dsjax_experts_moved"] = "Experts that devices have got from others.", engine.rebalancer.moved
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(name, what, value)
        for name, (what, value) in counters.items():
            yield CounterMetricFamily(name, what, value)
