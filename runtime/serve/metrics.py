"""/metrics, in Prometheus's form: llama.cpp's names, and ours for what it does not count."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from runtime.compute.paging import PagedStats
from runtime.errors import UserError
from runtime.serve.jobs import End
from runtime.serve.service import Figures, Service, Ticket

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = (1, 2, 4, 8, 16, 32, 64)


class Metrics(Collector):
    """What a service counts, as metrics. Times of answers are noted when they end: one that was cancelled has none."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._queued = self._histogram("queue_seconds", "Time that a request waited before its prompt was begun")
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token")
        self._between = self._histogram("time_per_token_seconds", "Mean time between the tokens of an answer")
        self._bytes = self._tokens = 0.0
        self._longest = self._drafted = self._accepted = 0
        service.on_end = self._ended

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"lazyneuron:{name}", about, buckets=_SECONDS, registry=self.registry)

    def _ended(self, ticket: Ticket, event: End | UserError) -> None:
        if not isinstance(event, End) or ticket.began is None or event.reason == "cancelled":
            return
        stats = event.stats
        self._longest = max(self._longest, stats.prompt_tokens + stats.tokens)
        self._drafted += stats.drafted_tokens
        self._accepted += stats.accepted_tokens
        self._queued.observe(ticket.began - ticket.asked)
        if stats.tokens:
            self._first.observe(ticket.began - ticket.asked + stats.prompt_seconds)
        if stats.decoded_tokens:
            self._between.observe(stats.seconds / stats.decoded_tokens)
            self._bytes += stats.bytes_per_token * stats.decoded_tokens
            self._tokens += stats.decoded_tokens

    def describe(self) -> Iterator[Metric]:
        """Nothing: while the model is loaded there is nothing to collect."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The figures of now."""
        yield _gauge("lazyneuron:ready", "1 while requests are taken", float(self._service.state == "ready"))
        yield _gauge("lazyneuron:uptime_seconds", "Since the server began", time.time() - self._service.started)
        if self._service.state in ("ready", "draining"):
            figures = self._service.figures()
            yield from _like_llama_cpp(figures)
            yield _gauge("llamacpp:n_tokens_max", "Tokens of the longest prompt with its answer", self._longest)
            drafts = "llamacpp:spec_decode_num"
            yield _counter(f"{drafts}_draft_tokens", "Tokens that were drafted", self._drafted)
            yield _counter(f"{drafts}_accepted_tokens", "Of these, the ones that were right", self._accepted)
            yield from _ours(figures)
            if self._tokens:
                read = self._bytes / self._tokens
                yield _gauge("lazyneuron:bytes_per_token", "Bytes read for a token, mean of all answers", read)


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(name, about, value=value)


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(name, about, value=value)


def _like_llama_cpp(figures: Figures) -> Iterator[Metric]:
    counts = figures.counts
    yield _counter("llamacpp:prompt_tokens", "Tokens of prompts that were computed", counts.prompt_tokens)
    yield _counter("llamacpp:prompt_tokens_cached", "Tokens of prompts that were reused", counts.cached_tokens)
    yield _counter("llamacpp:prompt_seconds", "Time that they took", counts.prompt_seconds)
    yield _counter("llamacpp:tokens_predicted", "Tokens that were generated", counts.answer_tokens)
    yield _counter("llamacpp:tokens_predicted_seconds", "Time that they took", counts.generated_seconds)
    yield _counter("llamacpp:n_decode", "Steps that were computed", counts.steps)
    busy = counts.busy_total / counts.steps if counts.steps else 0.0
    yield _gauge("llamacpp:n_busy_slots_per_decode", "Answers in a step, mean", busy)
    speed = counts.prompt_tokens / counts.prompt_seconds if counts.prompt_seconds else 0.0
    yield _gauge("llamacpp:prompt_tokens_seconds", "Tokens of prompts per second, mean", speed)
    speed = counts.generated_tokens / counts.generated_seconds if counts.generated_seconds else 0.0
    yield _gauge("llamacpp:predicted_tokens_seconds", "Generated tokens per second, mean", speed)
    yield _gauge("llamacpp:requests_processing", "Answers that are computed", figures.running)
    yield _gauge("llamacpp:requests_deferred", "Requests that wait", figures.waiting)
    yield _gauge("llamacpp:kv_cache_usage_ratio", "Share of the cells in use", figures.cells_used / figures.cells)
    yield _gauge("llamacpp:kv_cache_tokens", "Cells in use", figures.cells_used)


def _ours(figures: Figures) -> Iterator[Metric]:
    counts = figures.counts
    yield _counter("lazyneuron:cached_tokens", "Tokens of prompts that were reused", counts.cached_tokens)
    yield _gauge("lazyneuron:computed_share", "Share of the neurons computed, of all tokens", figures.computed_share)
    shares = GaugeMetricFamily("lazyneuron:layer_share", "The same of each layer", labels=["layer"])
    for i, share in enumerate(figures.layer_shares):
        shares.add_metric([str(i)], share)
    yield shares
    yield _gauge("lazyneuron:kept_tokens", "Tokens of ended requests that are kept for the next", figures.kept_tokens)
    ended = CounterMetricFamily("lazyneuron:answers", "Answers by the reason of their end", labels=["reason"])
    for reason, n in sorted(figures.ended.items()):
        ended.add_metric([reason], n)
    yield ended
    yield _batches(counts.batches)
    if figures.paged:
        yield from _paged(figures.paged)


def _paged(paged: PagedStats) -> Iterator[Metric]:
    """With a budget of main memory."""
    yield _counter("lazyneuron:paged_wanted_bytes", "Pages with rows that were asked for", paged.wanted)
    yield _counter("lazyneuron:paged_read_bytes", "Of these, those that were read from the disk", paged.read)
    yield _counter("lazyneuron:paged_dropped_bytes", "Pages that were dropped for others", paged.dropped)
    yield _counter("lazyneuron:paged_reads", "Reads of some pages each", paged.reads)
    yield _counter("lazyneuron:paged_seconds", "Time that computing waited for the disk", paged.seconds)
    yield _gauge("lazyneuron:paged_resident_bytes", "Rows in memory", paged.resident)
    yield _gauge("lazyneuron:paged_limit_bytes", "Rows that may be in memory", paged.limit)


def _batches(batches: dict[int, int]) -> Metric:
    """Steps by the tokens that they computed together."""
    bounds: list[tuple[str, float]] = [
        (str(bound), sum(n for size, n in batches.items() if size <= bound)) for bound in _TOKENS
    ]
    found = HistogramMetricFamily("lazyneuron:batch_tokens", "Tokens that a step of decoding computed together")
    total = sum(batches.values())
    found.add_metric([], [*bounds, ("+Inf", total)], sum(size * n for size, n in batches.items()))
    return found
