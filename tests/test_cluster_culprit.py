"""Who is to blame: the decision of ``ray_deepep.cluster``, without a cluster."""

import json
import pickle

import pytest
import torch
from harness import error_of

from ray_deepep import FaultRecord, InvalidArgumentError, MismatchError

pytest.importorskip("ray", reason="ray_deepep.cluster needs Ray")

from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

from ray_deepep import CommFaultError
from ray_deepep.cluster import RankFault, RankState, RankStatus, decide_culprit, ep_groups
from ray_deepep.cluster.evidence import look
from ray_deepep.cluster.supervision import WorkerFaultError, append_fault, with_culprit
from train.inject import _allocate_too_much


def fault(reporter: int, blamed: int, cause: str = "timeout", sequence: int = 5, elapsed_s: float = 3.0) -> RankFault:
    record = FaultRecord(
        operation="dispatch",
        sequence=sequence,
        phase="wait_published",
        cause=cause,
        rank=reporter,
        peer=blamed,
        expected=sequence,
        seen=sequence - 1,
        elapsed_s=elapsed_s,
        deadline_s=3.0,
        peer_host=f"host{blamed}",
        peer_pid=100 + blamed,
    )
    return RankFault(reporter=reporter, blamed=blamed, record=record)


def statuses(num_ranks: int, **states: RankState) -> dict[int, RankStatus]:
    """All running, but ``r1=RankState.DEAD``."""
    found = {rank: RankStatus(state=RankState.RUNNING, pid=100 + rank) for rank in range(num_ranks)}
    return found | {int(r[1:]): RankStatus(state=s, pid=100 + int(r[1:]), error="e") for r, s in states.items()}


def test_nothing_known_blames_nobody():
    assert decide_culprit([], statuses(4)) is None


@pytest.mark.parametrize(
    ("faults", "known", "rank", "cause"),
    [
        pytest.param([], {"r2": RankState.DEAD}, 2, "died", id="dead"),
        pytest.param([fault(0, 3, "peer_died")], {}, 3, "died", id="dead, seen only by a peer"),
        pytest.param(
            [fault(0, 1), fault(2, 1)], {"r3": RankState.DEAD, "r0": RankState.FAULTED}, 3, "died", id="dead beats late"
        ),
        pytest.param(
            [fault(0, 1), fault(2, 1)], {"r3": RankState.RAISED}, 3, "raised", id="own error beats late majority"
        ),
        pytest.param([fault(0, 1)], {"r1": RankState.STOPPED, "r2": RankState.RAISED}, 1, "stopped", id="stopped"),
        pytest.param(
            [], {"r0": RankState.COLLECTIVE, "r1": RankState.STOPPED}, 1, "stopped", id="stopped, gloo failed"
        ),
        pytest.param([fault(0, 2), fault(1, 2), fault(3, 0)], {}, 2, "late", id="chain of waits"),
        pytest.param([fault(0, 1), fault(2, 1), fault(3, 4)], {}, 1, "late", id="majority"),
        pytest.param([fault(0, 3, sequence=9), fault(1, 2, sequence=4)], {}, 2, "late", id="earliest wait"),
        pytest.param(
            [fault(0, 1, sequence=4), fault(1, 0, sequence=6)], {}, 1, "late", id="circle: the first wait decides"
        ),
        pytest.param(
            [fault(0, 1), fault(1, 0, "peer_closed")], {}, 1, "late", id="a late rank that then met a closed peer"
        ),
        pytest.param([fault(0, 1, "peer_closed"), fault(2, 1, "peer_closed")], {}, 1, "closed", id="left early"),
        pytest.param([fault(0, 1, "aborted")], {}, 1, "closed", id="aborted"),
        pytest.param([], {"r0": RankState.COLLECTIVE, "r2": RankState.UNRESPONSIVE}, 2, "unresponsive", id="silent"),
        pytest.param([], {"r1": RankState.COLLECTIVE}, 1, "collective", id="torch.distributed alone"),
    ],
)
def test_culprit(faults, known, rank, cause):
    culprit = decide_culprit(faults, statuses(5, **known))
    assert (culprit.world_rank, culprit.cause) == (rank, cause)


def test_among_several_dead_the_most_blamed_then_the_lowest():
    dead = {"r1": RankState.DEAD, "r3": RankState.DEAD}
    assert decide_culprit([], statuses(4, **dead)).world_rank == 1
    assert decide_culprit([fault(0, 3, "peer_died")], statuses(4, **dead)).world_rank == 3


def test_culprit_says_who_waited_and_is_one_line_of_json():
    culprit = decide_culprit([fault(2, 1, sequence=8), fault(0, 1, sequence=7)], statuses(3))
    assert culprit.reporters == (0, 2)
    assert culprit.record.sequence == 7
    assert "rank 1 (pid 101" in str(culprit)
    assert "ranks 0, 2 waited for it 3.0 s in dispatch #7" in str(culprit)
    line = culprit.to_json(run="r", attempt=2)
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["rank"], fields["cause"], fields["attempt"], fields["record"]["peer_pid"]) == (1, "late", 2, 101)


def test_a_suffering_rank_is_not_accused_with_its_own_error():
    known = statuses(2, r1=RankState.FAULTED)
    culprit = decide_culprit([fault(0, 1), fault(1, 0, "peer_closed")], known)
    assert culprit.world_rank == 1
    assert culprit.error == ""


class KilledForMemory(ActorDiedError):
    """As Ray's when its memory monitor ends a worker."""

    def __str__(self) -> str:
        return "The actor died. Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: Task was killed"


ASSERTED = "CUDA error: device-side assert triggered"
RECORD = fault(0, 1).record


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def refused_by_torch() -> Exception:
    return error_of(RuntimeError, _allocate_too_much)


@pytest.mark.parametrize(
    ("error", "has_record", "state"),
    [
        (None, False, RankState.RUNNING),
        (WorkerHealthCheckFailedError("failed", ActorDiedError()), False, RankState.DEAD),
        (WorkerHealthCheckFailedError("failed", ValueError("pickle")), False, RankState.UNRESPONSIVE),
        (UserExceptionWithTraceback(KeyError("x"), "tb"), False, RankState.RAISED),
        (UserExceptionWithTraceback(RuntimeError("wrapped"), "tb"), True, RankState.FAULTED),
        (UserExceptionWithTraceback(RuntimeError("[gloo] closed"), "tb"), False, RankState.COLLECTIVE),
        (UserExceptionWithTraceback(MemoryError(), "tb"), False, RankState.OUT_OF_MEMORY),
        (UserExceptionWithTraceback(torch.OutOfMemoryError("CUDA out of memory"), "tb"), True, RankState.OUT_OF_MEMORY),
        (UserExceptionWithTraceback(caused(ValueError("no"), MemoryError()), "tb"), False, RankState.OUT_OF_MEMORY),
        (UserExceptionWithTraceback(refused_by_torch(), "tb"), False, RankState.OUT_OF_MEMORY),
        (WorkerHealthCheckFailedError("failed", KilledForMemory()), False, RankState.OUT_OF_MEMORY),
        (UserExceptionWithTraceback(RuntimeError(ASSERTED), "tb"), False, RankState.DEVICE_FAILED),
        (UserExceptionWithTraceback(MismatchError("dispatch", 1, "num_topk", 2, 4), "tb"), False, RankState.MISMATCHED),
        (UserExceptionWithTraceback(caused(ValueError("no"), CommFaultError(RECORD)), "tb"), True, RankState.FAULTED),
    ],
)
def test_state_of_a_rank_from_its_poll_status(error, has_record, state):
    record = fault(0, 1).record if has_record else None
    assert look(WorkerStatus(running=True, error=error), record)[0] is state


def test_a_rank_that_has_not_met_its_fault_suffers_already():
    assert look(WorkerStatus(running=True), RECORD) == (RankState.FAULTED, "")


def test_state_of_a_finished_rank():
    assert look(WorkerStatus(running=False), None) == (RankState.FINISHED, "")


def test_verdict_is_put_before_the_culprits_error_and_keeps_its_type():
    culprit = decide_culprit([fault(0, 1)], statuses(2))
    raised = with_culprit(UserExceptionWithTraceback(KeyError("x"), "the traceback"), culprit)
    assert str(raised).startswith("rank 1 (pid 101")
    assert str(raised).endswith("the traceback")
    died = with_culprit(WorkerHealthCheckFailedError("failed", ActorDiedError()), culprit)
    assert isinstance(died.health_check_failure, ActorDiedError)
    status = WorkerGroupPollStatus({1: WorkerStatus(running=True, error=with_culprit(None, culprit))})
    assert "rank 1 (pid 101" in str(status.get_worker_group_error())


def test_errors_survive_pickling():
    culprit = decide_culprit([fault(0, 1)], statuses(2))
    again = pickle.loads(pickle.dumps(WorkerFaultError(culprit)))
    assert again.culprit == culprit
    assert pickle.loads(pickle.dumps(CommFaultError(fault(0, 1).record))).record.peer == 1


def test_ep_groups_are_consecutive_ranks():
    assert ep_groups(4, None) == ((0, 1, 2, 3),)
    assert ep_groups(6, 2) == ((0, 1), (2, 3), (4, 5))


@pytest.mark.parametrize("ep_size", [0, -1, 3, 8])
def test_ep_size_must_divide_the_world(ep_size):
    with pytest.raises(InvalidArgumentError, match="ep_size: must divide the world size 4"):
        ep_groups(4, ep_size)


def test_a_fault_log_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    append_fault("", "{}")
    for line in ("{}", "[]"):
        append_fault(str(tmp_path / "faults.jsonl"), line)
    assert (tmp_path / "faults.jsonl").read_text() == "{}\n[]\n"
    assert not caplog.records
    append_fault(str(tmp_path / "no" / "faults.jsonl"), "{}")
    assert "fault_log" in caplog.text and str(tmp_path / "no") in caplog.text
