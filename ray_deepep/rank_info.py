"""What ranks tell each other when they first meet, and what is to be said of it: pure but for the exchange itself."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence

from .errors import InvalidArgumentError, InvalidTypeError, describe_shared_gpus
from .nvshmem_decisions import RankReport

logger = logging.getLogger("ray_deepep")

Exchange = Callable[[str, bytes], list[bytes]]
"""``exchange(phase, payload)`` returns the payloads of all ranks in rank order. It must raise ``BootstrapError``
naming the missing ranks when its own deadline expires. Called the same number of times on every rank; after bootstrap
only where NVSHMEM is used, when buffers are made and when it is finalized."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankInfo:
    """What a rank tells its peers at bootstrap."""

    rank: int
    host: str
    pid: int
    machine: str
    """Equal on two ranks exactly if they can share memory: boot id, network namespace and user."""
    core: str
    """Version of the compiled core; empty if it cannot be loaded."""
    core_problem: str
    config: dict[str, object]
    has_group: bool
    cuda_problem: str = "no CUDA core"
    """Why the CUDA core cannot be used; empty if it can."""
    gpu: str = ""
    """UUID of its GPU; empty if the CUDA core cannot be used."""
    has_gpu: bool = False
    """Whether torch sees a GPU, with or without a CUDA core."""
    nvshmem: RankReport | None = None
    """What it has of NVSHMEM; None where it did not look, since nothing depends on it."""

    def __post_init__(self) -> None:
        if isinstance(self.nvshmem, dict):
            # As dataclasses.asdict leaves it.
            object.__setattr__(self, "nvshmem", RankReport(**self.nvshmem))


def meet(exchange: Exchange, mine: RankInfo, num_ranks: int) -> tuple[RankInfo, ...]:
    """What all ranks tell; collective.

    Raises:
        BootstrapError: as the exchange does.
        InvalidTypeError, InvalidArgumentError: the exchange gave something else than the ranks' payloads in rank order,
            or ranks have different configs.
    """
    payloads = exchange("meet", json.dumps(dataclasses.asdict(mine)).encode())
    if not isinstance(payloads, list | tuple):
        raise InvalidTypeError("exchange", type(payloads).__name__, "must return a list of payloads")
    if len(payloads) != num_ranks:
        raise InvalidArgumentError("exchange", len(payloads), f"must return one payload per rank ({num_ranks})")
    try:
        peers = tuple(RankInfo(**json.loads(payload)) for payload in payloads)
    except (TypeError, ValueError) as error:
        rule = "must return the payloads of ranks with this version of ray_deepep, unchanged"
        raise InvalidArgumentError("exchange", str(error), rule) from error
    for position, peer in enumerate(peers):
        if peer.rank != position:
            raise InvalidArgumentError("exchange", [p.rank for p in peers], "must return payloads in rank order")
        if peer.config != peers[0].config:
            different = sorted(k for k in mine.config if peer.config[k] != peers[0].config[k])
            theirs, first = ([p.config[k] for k in different] for p in (peer, peers[0]))
            values = f"rank {position}: {theirs}, rank 0: {first}"
            raise InvalidArgumentError("config", values, f"{', '.join(different)} must be the same on all ranks")
    return peers


def shared_gpus(gpus: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Ranks that share a GPU, by its UUID; ``gpus`` has each rank's, empty where it has none.

    A UUID names a GPU in the world, so ranks in different containers of a machine are found too.
    """
    ranks: dict[str, list[int]] = {}
    for rank, gpu in enumerate(gpus):
        if gpu:
            ranks.setdefault(gpu, []).append(rank)
    return {gpu: tuple(sharing) for gpu, sharing in ranks.items() if len(sharing) > 1}


def warn_of_shared_gpus(peers: Sequence[RankInfo]) -> None:
    """One warning that names all ranks that share a GPU, if some do."""
    shared = shared_gpus([peer.gpu for peer in peers])
    if shared:
        words = describe_shared_gpus(shared)
        logger.warning("%s on %s; they take turns, or run together under MPS", words, peers[0].host)
