"""Counters of what the server did, as text that Prometheus reads (exposition format 0.0.4).

In: `count` and `observe`, from any thread. Out: `text`. Names are fixed here, so that
every series is there from the start.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping

_COUNTERS = {
    "mlx_gemma4_requests_total": "HTTP requests answered, by path and status.",
    "mlx_gemma4_refused_total": "Requests refused because the queue was full.",
    "mlx_gemma4_cancelled_total": "Requests whose client went away while they were answered.",
    "mlx_gemma4_prompt_tokens_total": "Prompt tokens read.",
    "mlx_gemma4_reused_tokens_total": "Prompt tokens that kept prefixes spared.",
    "mlx_gemma4_reply_tokens_total": "Tokens of replies.",
}
_HISTOGRAMS = {
    "mlx_gemma4_first_token_seconds": "From a request's arrival to its first token.",
    "mlx_gemma4_reply_seconds": "From a request's arrival to its end.",
}
_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds


class Metrics:
    """Everything counted since the start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, float]] = {name: defaultdict(float) for name in _COUNTERS}
        self._buckets = {name: [0] * (len(_BOUNDS) + 1) for name in _HISTOGRAMS}
        self._sums = dict.fromkeys(_HISTOGRAMS, 0.0)

    def count(self, name: str, by: float = 1, labels: str = "") -> None:
        """Raise a counter; `labels` as they are written, 'path="/health"'. They must be few."""
        with self._lock:
            self._counts[name][labels] += by

    def observe(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        with self._lock:
            self._buckets[name][sum(seconds > bound for bound in _BOUNDS)] += 1
            self._sums[name] += seconds

    def text(self, gauges: Mapping[str, tuple[float, str]]) -> str:
        """All of it, and `gauges`: name -> (value now, what it is)."""
        lines: list[str] = []
        with self._lock:
            for name, help_ in _COUNTERS.items():
                lines += [f"# HELP {name} {help_}", f"# TYPE {name} counter"]
                series = self._counts[name] or ({} if "by path" in help_ else {"": 0})
                lines += [f"{name}{{{labels}}} {n:g}" if labels else f"{name} {n:.0f}" for labels, n in series.items()]
            for name, help_ in _HISTOGRAMS.items():
                lines += [f"# HELP {name} {help_}", f"# TYPE {name} histogram"]
                total = 0
                for bound, n in zip((*map(str, _BOUNDS), "+Inf"), self._buckets[name], strict=True):
                    total += n
                    lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
                lines += [f"{name}_sum {self._sums[name]:.6f}", f"{name}_count {total}"]
        for name, (value, help_) in gauges.items():
            lines += [f"# HELP {name} {help_}", f"# TYPE {name} gauge", f"{name} {value:.0f}"]
        return "\n".join(lines) + "\n"
