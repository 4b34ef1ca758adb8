"""Counters of what the server did, as Prometheus reads them.

In: counts and times, from any thread. Out: `text`. A registry for each server, so that tests can have several.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds


class Metrics:
    """Everything counted since the start."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP requests answered.", "path", "status")
        self.refused = self._counter("refused", "Requests refused because the queue was full.")
        self.cancelled = self._counter("cancelled", "Requests whose client went away while they were answered.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens read.")
        self.reused_tokens = self._counter("reused_tokens", "Prompt tokens that kept prefixes spared.")
        self.reply_tokens = self._counter("reply_tokens", "Tokens of replies.")
        self.drafted_tokens = self._counter("drafted_tokens", "Drafts of tokens that steps checked.")
        self.accepted_tokens = self._counter("accepted_tokens", "Tokens of replies that drafts had right.")
        self.first_token = self._histogram("first_token_seconds", "From a request's arrival to its first token.")
        self.reply = self._histogram("reply_seconds", "From a request's arrival to its end.")

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Add a number that is asked for when `text` is."""
        Gauge(f"mlx_gemma4_{name}", about, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of it, in the exposition format 0.0.4."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"mlx_gemma4_{name}", about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(f"mlx_gemma4_{name}", about, buckets=_BOUNDS, registry=self.registry)
