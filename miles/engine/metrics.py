"""Counters of an engine as Prometheus text, under SGLang's names where SGLang has them."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass
class Histogram:
    """Counts of observations [s] in fixed buckets."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one observation."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds


@dataclass
class Metrics:
    """Written by the engine's thread, read by the HTTP side; each number stands alone, so no lock is needed."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0
    requests: int = 0
    aborted: int = 0
    retractions: int = 0
    steps: int = 0
    running: int = 0
    queued: int = 0
    used_tokens: int = 0
    capacity: int = 0
    gen_throughput: float = 0.0
    weight_updates: int = 0
    latency: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)

    def text(self, model: str) -> str:
        """Prometheus' text format 0.0.4. Units are in the names: tokens, seconds."""
        label = 'model_name="{}"'.format(model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"))
        lines: list[str] = []

        def add(name: str, kind: str, what: str, value: float) -> None:
            lines.extend((f"# HELP {name} {what}", f"# TYPE {name} {kind}", f"{name}{{{label}}} {value:g}" if isinstance(value, float) else f"{name}{{{label}}} {value}"))

        add("sglang:num_running_reqs", "gauge", "The number of running requests.", self.running)
        add("sglang:num_queue_reqs", "gauge", "The number of requests in the waiting queue.", self.queued)
        add("sglang:num_used_tokens", "gauge", "The number of used tokens.", self.used_tokens)
        add("sglang:max_total_num_tokens", "gauge", "Size of the key-value cache in tokens.", self.capacity)
        add("sglang:token_usage", "gauge", "The token usage.", self.used_tokens / max(self.capacity, 1))
        add("sglang:gen_throughput", "gauge", "The generation throughput (token/s).", self.gen_throughput)
        add("sglang:cache_hit_rate", "gauge", "The prefix cache hit rate.", self.cached_tokens / max(self.prompt_tokens, 1))
        add("sglang:prompt_tokens_total", "counter", "Number of prefill tokens processed.", self.prompt_tokens)
        add("sglang:generation_tokens_total", "counter", "Number of generation tokens processed.", self.generation_tokens)
        add("sglang:cached_tokens_total", "counter", "Number of cached prompt tokens.", self.cached_tokens)
        add("sglang:num_requests_total", "counter", "Number of requests processed.", self.requests)
        add("sglang:num_aborted_requests_total", "counter", "Number of requests aborted.", self.aborted)
        add("sglang:num_retracted_requests_total", "counter", "Number of retractions.", self.retractions)
        add("miles:model_steps_total", "counter", "Number of forward passes.", self.steps)
        add("miles:weight_updates_total", "counter", "Number of weight updates.", self.weight_updates)
        for name, what, histogram in (
            ("sglang:e2e_request_latency_seconds", "Histogram of End-to-end request latency in seconds", self.latency),
            ("sglang:time_to_first_token_seconds", "Histogram of time to first token in seconds.", self.first_token),
        ):
            lines.extend((f"# HELP {name} {what}", f"# TYPE {name} histogram"))
            seen = 0
            for bound, count in zip((*map(str, SECONDS), "+Inf"), list(histogram.counts), strict=True):
                seen += count
                lines.append(f'{name}_bucket{{{label},le="{bound}"}} {seen}')
            lines.append(f"{name}_sum{{{label}}} {histogram.total:g}")
            lines.append(f"{name}_count{{{label}}} {seen}")
        return "\n".join(lines) + "\n"
