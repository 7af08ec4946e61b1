"""When a new dispatch of transport ``cuda`` is launched to move rows, and into which outputs: on a made-up core."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from ray_deepep import ExpertMajor, Float8Cast, Padded, ReceiveOverflowError, TokenMajor
from ray_deepep.cuda import CudaTransport
from ray_deepep.cuda_arguments import CudaPlan
from ray_deepep.float8 import FLOAT8
from ray_deepep.guessed_rows import GuessedRows
from ray_deepep.transport import DispatchRequest

HIDDEN, MOST = 256, 1000


class Core:
    """Stands for the compiled buffer; `arrives` rows come next."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.arrives, self.overflow_rank = 0, -1
        self.moved_to = 0

    def begin_dispatch(self, args, plan, report, stream) -> None:
        self.calls.append("plan")

    def pull_dispatch(self, args, plan, cached, room, num_sms, stream) -> None:
        self.calls.append(f"pull {room}")
        if room < 0 or (self.arrives <= room and self.overflow_rank < 0):
            self.calls.append("rows move")
            self.moved_to = args.out_x

    def wait_counts(self) -> SimpleNamespace:
        self.calls.append("wait")
        return SimpleNamespace(
            num_rows=self.arrives,
            num_recv_tokens=self.arrives,
            overflow_rank=self.overflow_rank,
            overflow_rows=self.arrives,
            expert_count=[self.arrives],
            expert_offset=[0, self.arrives],
        )

    def check_routing(self) -> None:
        self.calls.append("check")


class Arguments:
    def new_plan(self, buffer, request, num_tokens, num_topk, stream) -> CudaPlan:
        rows = 4 * request.layout.capacity if isinstance(request.layout, Padded) else MOST
        return CudaPlan(core=None, memory=torch.zeros(1, dtype=torch.int32), stream=stream, num_rows=rows)

    def dispatch(self, request, topk_idx, recv_topk_idx, recv_weights) -> SimpleNamespace:
        return SimpleNamespace(out_x=0, out_scales=0)


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> CudaTransport:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    made = object.__new__(CudaTransport)
    made._buffer, made._arguments, made._guessed_rows = Core(), Arguments(), GuessedRows()
    made._geometry = SimpleNamespace(hidden=HIDDEN, max_rows=MOST)
    made.device, made._first_rank = torch.device("cpu"), 0
    return made


def dispatch(transport: CudaTransport, layout: object, arrives: int, **more: object):
    transport._buffer.arrives = arrives
    transport._buffer.calls.clear()
    request = DispatchRequest(
        x=torch.zeros(3, HIDDEN, dtype=torch.bfloat16),
        x_scales=None,
        topk_idx=torch.zeros(3, 1, dtype=torch.int64),
        topk_weights=None,
        locations=None,
        layout=layout,
        handle=None,
        scale_by_weights=False,
        max_recv_tokens=None,
        cast=None,
        num_sms=None,
    )
    output = transport._new_dispatch(dataclasses.replace(request, **more), 24, 0)
    assert output.x.shape == (arrives, HIDDEN) and output.x.is_contiguous()
    assert arrives == 0 or output.x.data_ptr() == transport._buffer.moved_to
    return output


@pytest.mark.parametrize("layout", (TokenMajor(), ExpertMajor(128)), ids=str)
def test_the_first_waits_the_next_does_not(transport: CudaTransport, layout: object) -> None:
    dispatch(transport, layout, 300)
    assert transport._buffer.calls == ["plan", "wait", "pull -1", "rows move", "check"]
    dispatch(transport, layout, 310)
    assert transport._buffer.calls == ["plan", "pull 384", "rows move", "wait", "check"]
    dispatch(transport, layout, 0)
    assert transport._buffer.calls == ["plan", "pull 384", "rows move", "wait", "check"]


def test_more_rows_than_there_is_room_for(transport: CudaTransport) -> None:
    dispatch(transport, TokenMajor(), 100)
    dispatch(transport, TokenMajor(), 129)
    assert transport._buffer.calls == ["plan", "pull 128", "wait", "pull -1", "rows move", "check"]
    dispatch(transport, TokenMajor(), 256)
    assert transport._buffer.calls == ["plan", "pull 256", "rows move", "wait", "check"]
    dispatch(transport, TokenMajor(), MOST)
    dispatch(transport, TokenMajor(), MOST)
    assert transport._buffer.calls == ["plan", f"pull {MOST}", "rows move", "wait", "check"]


def test_padded_rows_never_wait(transport: CudaTransport) -> None:
    dispatch(transport, Padded(16), 64)
    assert transport._buffer.calls == ["plan", "pull 64", "rows move", "wait", "check"]


def test_scales_are_cut_with_their_rows(transport: CudaTransport) -> None:
    for arrives in (300, 200):
        output = dispatch(transport, TokenMajor(), arrives, cast=Float8Cast())
        assert output.x.dtype is FLOAT8 and output.x_scales.shape == (arrives, HIDDEN // 128)
        assert output.x_scales.is_contiguous()


def test_an_overflow_moves_nothing(transport: CudaTransport) -> None:
    dispatch(transport, TokenMajor(), 100)
    transport._buffer.overflow_rank = 1
    with pytest.raises(ReceiveOverflowError):
        dispatch(transport, TokenMajor(), 2000)
    assert transport._buffer.calls == ["plan", "pull 128", "wait"]
    transport._buffer.overflow_rank = -1
    dispatch(transport, TokenMajor(), 110)
    assert transport._buffer.calls == ["plan", "pull 128", "rows move", "wait", "check"]
