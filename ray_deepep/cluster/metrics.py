"""Records of training steps as Ray's metrics, which Prometheus reads from every node (``docs/metrics.md``).

Each has the tags ``run`` and ``rank``; Ray adds the session, the node and the process. Ray puts ``ray_`` in front of
names, and ``_total`` behind those of counters: ``ray_deepep_loss``, ``ray_deepep_wait_us_total``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray.util.metrics import Counter, Gauge

PREFIX = "deepep_"
_TAGS = ("run", "rank")
GAUGES: Mapping[str, str] = {
    "step": "Optimizer steps done",
    "loss": "Cross-entropy per token, in nats",
    "aux_loss": "Load-balancing loss",
    "lr": "Learning rate",
    "tokens_per_s": "Tokens of all ranks per second",
    "imbalance": "Fullest local expert over the mean of the local ones, last step",
    "heap_bytes": "Bytes of the rank's heap in use",
    "restarts": "Starts of the workers after the first",
}
"""By field of a record; the metric has the same name behind the prefix."""
PARTS = ("step_ms", "forward_ms", "backward_ms", "optimizer_ms", "attention_ms", "gate_ms", "experts_ms")
OPERATIONS = ("dispatch", "combine")


class RayMetricsSink:
    """A sink of ``StepTelemetry``; for a process that is connected to Ray.

    Args:
        run: name of the run.
        rank: world rank of this process.
        ranks: world ranks of its EP group, in order: peers are named by them.
    """

    def __init__(self, *, run: str, rank: int, ranks: Sequence[int]) -> None:
        self._tags = {"run": run, "rank": str(rank)}
        self._ranks, self._index = tuple(ranks), tuple(ranks).index(rank)
        self._gauges = {field: self._gauge(field, text) for field, text in GAUGES.items()}
        self._part_ms = self._gauge("step_part_ms", "Time of a step and of its parts, ms", "part")
        self._comm_us = self._gauge("comm_us", "Mean time of a call, waits included, us", "operation")
        self._gb_per_s = self._gauge("comm_gb_per_s", "Rows moved over the time of the calls, GB/s", "operation")
        self._tokens = self._gauge("expert_tokens", "Routes that reached an expert in the last step", "expert")
        self._calls = self._counter("comm_calls", "Calls", "operation")
        self._recv_bytes = self._counter("recv_bytes", "Bytes of rows read from a peer", "peer")
        self._wait_us = self._counter("wait_us", "Time waited for a peer, us", "peer")
        self._dropped = self._counter("dropped_tokens", "Routes that the gate dropped")

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Counters get all records, gauges the last one: Prometheus looks every few seconds, not at every step."""
        for record in records:
            self._count(record)
        last = records[-1]
        for field, gauge in self._gauges.items():
            if field in last:
                gauge.set(last[field], tags=self._tags)
        for part in PARTS:
            if part in last:
                self._part_ms.set(last[part], tags=self._with(part=part.removesuffix("_ms")))
        for operation in OPERATIONS:
            for unit, gauge in (("us", self._comm_us), ("gb_per_s", self._gb_per_s)):
                if f"{operation}_{unit}" in last:
                    gauge.set(last[f"{operation}_{unit}"], tags=self._with(operation=operation))
        tokens = last.get("num_tokens_per_expert", ())
        for local, count in enumerate(tokens):
            self._tokens.set(count, tags=self._with(expert=str(self._index * len(tokens) + local)))

    def close(self) -> None:
        """Ray sends what it has by itself."""

    def _count(self, record: Mapping[str, Any]) -> None:
        for operation in OPERATIONS:
            if calls := record.get(f"num_{operation}"):
                self._calls.inc(calls, tags=self._with(operation=operation))
        for field, counter in (("recv_bytes", self._recv_bytes), ("wait_us", self._wait_us)):
            for peer, value in zip(self._ranks, record.get(field, ())):
                if value > 0:  # Ray's counters take nothing else
                    counter.inc(value, tags=self._with(peer=str(peer)))
        if record.get("num_dropped"):
            self._dropped.inc(record["num_dropped"], tags=self._tags)

    def _with(self, **tags: str) -> dict[str, str]:
        return self._tags | tags

    def _gauge(self, name: str, description: str, *tags: str) -> Gauge:
        return Gauge(f"{PREFIX}{name}", description, tag_keys=(*_TAGS, *tags))

    def _counter(self, name: str, description: str, *tags: str) -> Counter:
        return Counter(f"{PREFIX}{name}", description, tag_keys=(*_TAGS, *tags))
