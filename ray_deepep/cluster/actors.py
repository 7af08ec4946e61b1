"""``bootstrap(actors)``: the communicator for any Ray actors, without Ray Train.

    actors = [MyActor.remote() for _ in range(4)]
    bootstrap(actors)
    # and in a method of MyActor:
    buffer = Buffer(current().communicator, num_experts=8, hidden=1024, num_topk=2, max_tokens=4096)

The actors meet in a small rendezvous actor that lives as long as their communicators. The driver keeps the deadline
too, so a dead actor, or one that is busy with another method, is named in time and nobody hangs.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
import torch.distributed as dist

from ..bounded import NoReturnError, call_within
from ..communicator import Communicator
from ..config import CommConfig
from ..errors import BootstrapError, InvalidArgumentError, InvalidTypeError, SharedGpuError
from ..fields import check_positive, check_str
from . import groups
from .exchange import RayExchange, make_rendezvous
from .gather import Answers, first_error, gather, one_line, refuse_shared_gpus
from .layout import ep_groups, group_of
from .processes import ProcessId, on_nodes, own_process, process_state
from .state import WorkerState, drop_state, keep_state

if TYPE_CHECKING:
    from ..deepspeed import SwapConfig

_CLEANUP_S = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorRank:
    """Where an actor ended up."""

    world_rank: int
    """Its index in the list of actors."""
    rank: int
    """Its index in its EP group."""
    ranks: tuple[int, ...]
    """World ranks of its EP group."""
    process: ProcessId
    transport: str
    transport_reason: str
    gpu: str
    """UUID of the GPU that it uses; empty if its transport uses none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _JoinSpec:
    world_rank: int
    world_size: int
    ep_groups: tuple[tuple[int, ...], ...]
    config: CommConfig
    process_group: str | None
    timeout_s: float
    swap: bool | SwapConfig


def bootstrap(
    actors: Sequence[ray.actor.ActorHandle],
    *,
    config: CommConfig | None = None,
    ep_size: int | None = None,
    process_group: str | None = None,
    timeout_s: float = 1800.0,
    swap: bool | SwapConfig = False,
) -> list[ActorRank]:
    """Give every actor a communicator of its EP group; ``ray_deepep.cluster.current()`` finds it in their methods.

    Args:
        actors: in the order of their world ranks.
        config: settings of the communicators.
        ep_size: ranks of one EP group, consecutive actors; None: all of them.
        process_group: also initialise torch.distributed with this backend (``gloo``, ``nccl``), which DeepSpeed and
            the ``reference`` transport need, and set the variables that torchrun sets.
        timeout_s: deadline of that group's operations.
        swap: also swap DeepSpeed's MoE layers in the actors; needs ``process_group``.

    Returns:
        One entry per actor.

    Raises:
        InvalidArgumentError, InvalidTypeError: before anything is sent.
        SharedGpuError: naming actors that use the same GPU, unless ``config.allow_shared_gpus``.
        BootstrapError: naming the actors that are dead, or did not take part within ``config.bootstrap_deadline_s``.
        Exception: what else an actor raised; then no actor keeps a communicator.
    """
    config = CommConfig() if config is None else config
    _check(actors, config, process_group, timeout_s, swap)
    groups_ = ep_groups(len(actors), ep_size)
    rendezvous = make_rendezvous(len(actors))
    spec = _JoinSpec(
        world_rank=0,
        world_size=len(actors),
        ep_groups=groups_,
        config=config,
        process_group=process_group,
        timeout_s=timeout_s,
        swap=swap,
    )
    refs = [
        actor.__ray_call__.remote(_try_join, rendezvous, dataclasses.replace(spec, world_rank=rank))
        for rank, actor in enumerate(actors)
    ]
    answers = gather(refs, config.bootstrap_deadline_s)
    if answers.errors or answers.missing:
        error = _diagnose(actors, answers, rendezvous, config.bootstrap_deadline_s)
        _break_off(refs, rendezvous, error.missing if isinstance(error, BootstrapError) else ())
        raise error
    ranks: list[ActorRank] = [answers.values[rank] for rank in range(len(actors))]
    try:
        refuse_shared_gpus([rank.gpu for rank in ranks], config)
    except SharedGpuError:
        teardown(actors)
        raise
    return ranks


def teardown(actors: Sequence[ray.actor.ActorHandle], timeout_s: float = 10.0) -> None:
    """Close the communicators of ``actors``, of those that are alive and answer within ``timeout_s``."""
    gather([actor.__ray_call__.remote(drop_state_of) for actor in actors], timeout_s, stop_at_error=False)


def drop_state_of(actor: Any) -> None:
    """Close what an actor instance holds; see :func:`teardown`."""
    drop_state(actor)


def _check(actors: object, config: object, process_group: object, timeout_s: object, swap: object) -> None:
    if not isinstance(config, CommConfig):
        raise InvalidTypeError("config", type(config).__name__, "must be a CommConfig")
    if process_group is not None:
        check_str("process_group", process_group)
    check_positive("timeout_s", timeout_s)
    groups.check_swap(swap)
    if not isinstance(actors, Sequence):
        raise InvalidTypeError("actors", type(actors).__name__, "must be a sequence of Ray actor handles")
    if not actors:
        raise InvalidArgumentError("actors", list(actors), "must name at least one actor")
    for index, actor in enumerate(actors):
        if not isinstance(actor, ray.actor.ActorHandle):
            raise InvalidTypeError("actors", f"{type(actor).__name__} at {index}", "must be Ray actor handles")
    ids = [actor._actor_id.hex() for actor in actors]
    for index, actor_id in enumerate(ids):
        if ids.index(actor_id) != index:
            raise InvalidArgumentError("actors", f"the actor at {index} again", "must be different actors")
    if swap is not False and process_group is None:
        raise InvalidArgumentError("swap", swap, "needs process_group, because DeepSpeed does")


def _diagnose(
    actors: Sequence[ray.actor.ActorHandle], answers: Answers, rendezvous: ray.actor.ActorHandle, deadline_s: float
) -> Exception:
    """Why a bootstrap failed, as the error to raise."""
    error = first_error(answers, phase="join", deadline_s=deadline_s, who=[_describe(actor) for actor in actors])
    if answers.dead or (answers.errors and not isinstance(error, BootstrapError)):
        return error
    # Ranks that wait do not answer either, so only the rendezvous knows who is missing.
    try:
        waiting_for = ray.get(rendezvous.waiting_for.remote(), timeout=_CLEANUP_S)
    except ray.exceptions.RayError:
        waiting_for = {}
    missing = sorted({rank for ranks in waiting_for.values() for rank in ranks}) or _stopped(actors) or error.missing
    phase = min(waiting_for, key=len).rsplit("/", 1)[-1] if waiting_for else error.phase
    details = "; ".join(f"rank {rank}, {_describe(actors[rank])}, did not come" for rank in missing)
    return BootstrapError(phase, missing, deadline_s, details or error.detail)


def _stopped(actors: Sequence[ray.actor.ActorHandle]) -> list[int]:
    """Ranks whose process is stopped, by a debugger or SIGSTOP; Ray counts them as alive."""
    processes = []
    for actor in actors:
        info = ray._private.state.state.actor_table(actor._actor_id.hex())
        address = info.get("Address", {})
        process = ProcessId(
            node_id=address.get("NodeID", ""), host=address.get("IPAddress", ""), pid=info.get("Pid", 0)
        )
        processes.append(process)
    states = on_nodes(process_state, processes, _CLEANUP_S)
    return [rank for rank, state in enumerate(states) if state == "stopped"]


def _break_off(refs: Sequence[ray.ObjectRef], rendezvous: ray.actor.ActorHandle, missing: Sequence[int]) -> None:
    """Release the actors that wait, and let those that come late meet nobody; all but ``missing`` are soon back."""
    ray.kill(rendezvous)
    gather([ref for rank, ref in enumerate(refs) if rank not in missing], _CLEANUP_S, stop_at_error=False)


def _describe(actor: ray.actor.ActorHandle) -> str:
    """An actor's class, process, node and state as the cluster knows them."""
    try:
        info = ray._private.state.state.actor_table(actor._actor_id.hex())
        address = info.get("Address", {})
        where = f"pid {info.get('Pid', 0)} on node {address.get('NodeID', '')[:12]} ({address.get('IPAddress', '')})"
        return f"{info.get('ActorClassName', 'actor')}, {where}, {info.get('State', 'unknown')}"
    except Exception as error:  # the description is an extra: whatever fails here must not hide the fault
        return f"actor {actor._actor_id.hex()} ({one_line(error, 80)})"


def _try_join(actor: Any, rendezvous: ray.actor.ActorHandle, spec: _JoinSpec) -> ActorRank | Exception:
    """Errors are values here: Ray would log those of a late actor as unhandled, long after the bootstrap failed."""
    try:
        return _join(actor, rendezvous, spec)
    except Exception as error:
        return error


def _join(actor: Any, rendezvous: ray.actor.ActorHandle, spec: _JoinSpec) -> ActorRank:
    """In the actor: meet the others, make the communicator, keep it."""
    drop_state(actor)
    everyone = tuple(range(spec.world_size))
    world = _exchange(rendezvous, spec, "world", everyone)
    process = own_process()
    world("join", json.dumps(dataclasses.asdict(process)).encode())
    if spec.process_group is not None:
        _init_process_group(world, spec)
    try:
        ranks, communicator = _make_communicator(rendezvous, spec)
    except BaseException:
        # No state holds it yet, and an actor that has one cannot take part in the next bootstrap.
        if spec.process_group is not None:
            dist.destroy_process_group()
        raise
    state = WorkerState(
        world_rank=spec.world_rank,
        world_size=spec.world_size,
        ranks=ranks,
        communicator=communicator,
        owns_process_group=spec.process_group is not None,
    )
    keep_state(state, actor)
    try:
        state.swap = groups.swap_deepspeed(spec.swap, communicator, ranks, spec.config)
        world("ready", b"")
        state.watch_health(None)
    except BaseException:
        drop_state(actor)
        raise
    return ActorRank(
        world_rank=spec.world_rank,
        rank=communicator.rank,
        ranks=ranks,
        process=process,
        transport=communicator.transport,
        transport_reason=communicator.transport_reason,
        gpu=communicator.gpu,
    )


def _make_communicator(rendezvous: ray.actor.ActorHandle, spec: _JoinSpec) -> tuple[tuple[int, ...], Communicator]:
    """The communicator of this rank's EP group, and the group's world ranks."""
    ranks, group = group_of(spec.world_rank, spec.ep_groups), None
    if dist.is_initialized() and dist.get_world_size() == spec.world_size:
        ranks, group = groups.own_ep_group(
            spec.ep_groups, spec.world_rank, spec.timeout_s, deadline_s=spec.config.bootstrap_deadline_s
        )
    communicator = Communicator(
        _exchange(rendezvous, spec, f"ep{ranks[0]}", ranks),
        rank=ranks.index(spec.world_rank),
        num_ranks=len(ranks),
        config=spec.config,
        group=group,
    )
    return ranks, communicator


def _exchange(rendezvous: ray.actor.ActorHandle, spec: _JoinSpec, name: str, ranks: tuple[int, ...]) -> RayExchange:
    return RayExchange(
        rendezvous, name=name, ranks=ranks, world_rank=spec.world_rank, deadline_s=spec.config.bootstrap_deadline_s
    )


def _init_process_group(world: RayExchange, spec: _JoinSpec) -> None:
    if dist.is_initialized():
        rule = "must be None in an actor whose torch.distributed is initialised already"
        raise InvalidArgumentError("process_group", spec.process_group, rule)
    offer = _free_address() if spec.world_rank == 0 else ("", 0)
    address, port = json.loads(world("address", json.dumps(offer).encode())[0])
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(spec.world_rank),
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_RANK": "0",  # an actor sees only its own GPUs
    }
    os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")  # see worker.py
    deadline_s = spec.config.bootstrap_deadline_s
    try:
        call_within(
            deadline_s,
            lambda: dist.init_process_group(
                spec.process_group,
                rank=spec.world_rank,
                world_size=spec.world_size,
                timeout=datetime.timedelta(seconds=spec.timeout_s),
            ),
            if_late=dist.destroy_process_group,
        )
    except NoReturnError:
        raise BootstrapError("process_group", [], deadline_s, groups.STORE_OF_RANK_0.format(address, port)) from None


def _free_address() -> tuple[str, int]:
    """This node's address as others see it, and a port that is free. Ray Train has the same, and takes seconds to
    import, which actors would spend for this alone."""
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind(("", 0))
        return address, probe.getsockname()[1]
