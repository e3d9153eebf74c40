"""What a server counts and measures of itself, as Prometheus reads it (text exposition format
0.0.4, prometheus.io/docs/instrumenting/exposition_formats). One thread writes: the event loop's."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
TOKENS = (16, 64, 256, 1024, 4096, 16384)
ROUTES = ("/", "/v1/chat/completions", "/v1/completions", "/generate")
ROUTES += ("/v1/models", "/health", "/metrics")
WINDOW = 10  # seconds that "tokens per second" looks back


class Histogram:
    """How many values were at most each bound; the last count is of all that were larger."""

    def __init__(self, bounds: tuple):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> list[str]:
        lines = []
        so_far = 0
        for bound, count in zip(self.bounds, self.counts):
            so_far += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {so_far}')
        so_far += self.counts[-1]
        lines.append(f'{name}_bucket{{le="+Inf"}} {so_far}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {so_far}"]


class Gauges:
    """All of a server's numbers. `state` is what is true now: {name: (help, number)}."""

    def __init__(self):
        self.requests = Counter()  # (path, status)
        self.errors = Counter()  # our code
        self.ended = Counter()  # rows by why they ended: stop, length, error, gone, timeout
        self.tokens = Counter()  # prompt, reused, new
        self.first_token = Histogram(SECONDS)
        self.between_tokens = Histogram(SECONDS)
        self.request = Histogram(SECONDS)
        self.prompt_tokens = Histogram(TOKENS)
        self.recent: deque[tuple[int, list[int]]] = deque()  # (second, [new tokens in it])

    def answered(self, path: str, status: int) -> None:
        """By route: other paths are whatever somebody tries."""
        self.requests[path if path in ROUTES else "other", status] += 1

    def new_tokens(self, n: int, now: float) -> None:
        """n tokens came, at `now` of time.monotonic()."""
        self.tokens["new"] += n
        second = int(now)
        if not self.recent or self.recent[-1][0] != second:
            self.recent.append((second, [0]))
        self.recent[-1][1][0] += n
        while self.recent[0][0] < second - WINDOW:
            self.recent.popleft()

    def tokens_per_second(self, now: float) -> float:
        """Of the last WINDOW whole seconds."""
        second = int(now)
        counts = [n[0] for at, n in self.recent if second - WINDOW <= at < second]
        return sum(counts) / WINDOW

    def render(self, state: dict[str, tuple[str, float]]) -> str:
        lines = []

        def head(name: str, kind: str, words: str) -> str:
            name = f"lumen_{name}"
            lines.extend([f"# HELP {name} {words}", f"# TYPE {name} {kind}"])
            return name

        def count(name: str, words: str, counts: Counter, *labels: str) -> None:
            name = head(name, "counter", words)
            for values, n in sorted(counts.items()):
                values = values if isinstance(values, tuple) else (values,)
                named = ",".join(f'{k}="{v}"' for k, v in zip(labels, values))
                lines.append(f"{name}{{{named}}} {n}")

        def histogram(name: str, words: str, of: Histogram) -> None:
            lines.extend(of.lines(head(name, "histogram", words)))

        count("requests_total", "answers by route and status", self.requests, "route", "status")
        count("errors_total", "answers that were errors, by Lumen's code", self.errors, "code")
        count("sequences_total", "sequences, by why they ended", self.ended, "reason")
        count("tokens_total", "tokens read, taken from the cache, written", self.tokens, "kind")
        words = "from a request's arrival to its first token"
        histogram("time_to_first_token_seconds", words, self.first_token)
        words = "between two tokens of one sequence"
        histogram("time_per_output_token_seconds", words, self.between_tokens)
        histogram("request_seconds", "from a request to the end of its answer", self.request)
        histogram("prompt_tokens", "tokens of a prompt", self.prompt_tokens)
        speed = f"new tokens per second, of the last {WINDOW} s"
        state = state | {"tokens_per_second": (speed, self.tokens_per_second(time.monotonic()))}
        for name, (words, value) in state.items():
            lines.append(f"{head(name, 'gauge', words)} {value:g}")
        return "\n".join(lines) + "\n"
