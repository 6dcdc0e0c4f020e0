"""What Prometheus reads at /metrics."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from offload.limit import Limit, bytes_by_link
from offload.serving.rounds import Rounds
from offload.streaming import Executor


class Metrics:
    """Counters of requests and tokens, and the state of the rounds. links: that a token takes, as measured once."""

    def __init__(self, rounds: Rounds, executor: Executor, links: Sequence[Limit]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "offload_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "offload_prompt_tokens", "Tokens of the prompts that were taken.", registry=registry
        )
        self.reused_tokens = Counter(
            "offload_reused_tokens", "Tokens of prompts that began like an earlier one.", registry=registry
        )
        self.new_tokens = Counter("offload_new_tokens", "Tokens that were generated.", registry=registry)
        registry.register(_RoundsCollector(rounds, executor, links))

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _RoundsCollector(Collector):
    def __init__(self, rounds: Rounds, executor: Executor, links: Sequence[Limit]) -> None:
        self._rounds, self._executor, self._links = rounds, executor, links

    def collect(self) -> Iterator[Metric]:
        """Yield what the rounds are at now."""
        rounds, stats = self._rounds, self._executor.stats
        yield GaugeMetricFamily("offload_queue_length", "Requests that wait in line.", rounds.waiting)
        yield GaugeMetricFamily("offload_running", "Requests that take part in the rounds.", rounds.running)
        yield CounterMetricFamily("offload_rounds", "Passes over the weights, each for all that run.", rounds.rounds)
        yield CounterMetricFamily("offload_read_bytes", "Weights read from disk.", stats.bytes_read)
        yield GaugeMetricFamily(
            "offload_tokens_per_second",
            "Of all that run, over the last rounds; a prompt counts as one for each of its chunks.",
            self._per_second(1),
        )
        rate = GaugeMetricFamily("offload_link_bytes_per_second", "As measured at the start.", labels=["link"])
        fraction = GaugeMetricFamily(
            "offload_link_fraction",
            "Of what each link can carry, over the last rounds; the link with the largest bounds decoding.",
            labels=["link"],
        )
        for link in self._links:
            rate.add_metric([link.link], link.bytes_per_second)
            fraction.add_metric([link.link], self._carried_per_second(link) / link.bytes_per_second)
        yield rate
        yield fraction

    def _carried_per_second(self, link: Limit) -> float:
        """Return the bytes that a link carries: what was read or has crossed, and what is multiplied for each."""
        if link.link == "disk":
            return self._per_second(0, of_read=1)
        if link.link == "bus":
            return self._per_second(0, of_copied=1)
        if link.link == "memory":
            return self._per_second(link.bytes_per_token - bytes_by_link(self._executor)["bus"], of_copied=1)
        return self._per_second(link.bytes_per_token)

    def _per_second(self, of_sequence: int, of_read: int = 0, of_copied: int = 0) -> float:
        """Return a sum over the last rounds by their seconds, 0 while nothing runs."""
        recent = list(self._rounds.recent) if self._rounds.running else []
        seconds = sum(one.seconds for one in recent)
        total = sum(
            of_sequence * one.sequences + of_read * one.bytes_read + of_copied * one.bytes_copied for one in recent
        )
        return total / seconds if seconds else 0.0
