"""All-gather of short byte strings between actors, through one small Ray actor that knows who is missing."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from ..errors import BootstrapError
from . import rendezvous_actor

_GRACE_S = 5.0
"""How much longer than the rendezvous a caller waits: for the reply's way back, or to find the rendezvous gone."""


def make_rendezvous(num_ranks: int) -> ray.actor.ActorHandle:
    """Start the actor in which ``num_ranks`` ranks can meet. It lives as long as its handles."""
    # By value, so that its process does not import this package and torch with it.
    ray.cloudpickle.register_pickle_by_value(rendezvous_actor)
    try:
        remote = ray.remote(num_cpus=0, max_concurrency=max(1000, 2 * num_ranks))(rendezvous_actor.Rendezvous)
        return remote.remote()
    finally:
        ray.cloudpickle.unregister_pickle_by_value(rendezvous_actor)


class RayExchange:
    """An exchange function for ``Communicator.from_exchange`` among some of a job's actors.

    Args:
        rendezvous: from :func:`make_rendezvous`.
        name: of the group; different groups on one rendezvous need different names.
        ranks: world ranks of the group.
        world_rank: of the caller.
        deadline_s: seconds that one phase waits for all ranks.
    """

    def __init__(
        self,
        rendezvous: ray.actor.ActorHandle,
        *,
        name: str,
        ranks: Sequence[int],
        world_rank: int,
        deadline_s: float,
    ) -> None:
        self._rendezvous = rendezvous
        self._name, self._ranks, self._world_rank = name, tuple(ranks), world_rank
        self._deadline_s = deadline_s
        self._num_calls = 0

    def __call__(self, phase: str, payload: bytes) -> list[bytes]:
        """Payloads of all ranks of the group, in their order. Called equally often, in the same order, on each.

        Raises:
            BootstrapError: naming the world ranks that did not come within the deadline.
        """
        self._num_calls += 1
        key = f"{self._name}/{self._num_calls}/{phase}"
        call = self._rendezvous.exchange.remote(key, self._ranks, self._world_rank, payload, self._deadline_s)
        try:
            payloads, missing = ray.get(call, timeout=self._deadline_s + _GRACE_S)
        except ray.exceptions.GetTimeoutError:
            raise BootstrapError(phase, [], self._deadline_s, "the rendezvous actor does not answer") from None
        except ray.exceptions.RayActorError as error:
            raise BootstrapError(phase, [], self._deadline_s, f"the rendezvous actor is gone: {error}") from None
        if missing:
            raise BootstrapError(phase, list(missing), self._deadline_s)
        return list(payloads)
