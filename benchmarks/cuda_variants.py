"""The operations of ``cuda_dispatch_combine``, each a complete call: what is sent, along which plan, from where."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ray_deepep import Buffer, Communicator, DispatchHandle, DispatchResult, ExpertMajor, Float8Cast, TokenMajor, float8

from .cuda_traffic import Case, Inputs, Moved, Traffic

ALIGNMENTS = (None, 1, 128)
"""Of expert-major outputs; None: token-major."""
SCALE_BLOCK = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One operation to time."""

    name: str
    call: Callable[[], object]
    moved: Moved
    facts: dict[str, object]
    """What the name says, as fields."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How rows go out."""

    name: str
    x: Tensor
    x_scales: Tensor | None = None
    cast: Float8Cast | None = None

    @property
    def row_bytes(self) -> int:
        """On the wire."""
        hidden = self.x.shape[1]
        if self.cast is not None or self.x_scales is not None:
            return hidden + 4 * hidden // SCALE_BLOCK
        return hidden * self.x.element_size()

    @property
    def more(self) -> dict[str, object]:
        """Arguments of a dispatch beside x and its routing."""
        given = {"x_scales": self.x_scales, "cast": self.cast}
        return {name: value for name, value in given.items() if value is not None}


def layout_of(alignment: int | None) -> TokenMajor | ExpertMajor:
    """Layout with this alignment; None: token-major."""
    return TokenMajor() if alignment is None else ExpertMajor(alignment)


def layout_name(alignment: int | None) -> str:
    """In a variant's name."""
    return "token-major" if alignment is None else f"expert-major {alignment}"


def symm_bytes(case: Case, traffic: Traffic) -> int:
    """Heap for all that is made resident: inputs as they are and as float8, and expert outputs in every layout."""
    element_size = getattr(torch, case.dtype).itemsize
    rows = case.num_tokens + sum(max(traffic.num_rows(alignment)) for alignment in ALIGNMENTS)
    # Blocks start at multiples of a few hundred bytes.
    return rows * case.hidden * element_size + case.num_tokens * case.hidden + (1 << 20)


def make_buffer(comm: Communicator, case: Case, traffic: Traffic) -> Buffer:
    """A buffer with room for the case; collective."""
    return Buffer(
        comm,
        num_experts=case.num_experts,
        hidden=case.hidden,
        num_topk=case.num_topk,
        max_tokens=case.num_tokens,
        symm_bytes=symm_bytes(case, traffic),
    )


class Variants:
    """All variants on one buffer. Making them is collective: their plans come from dispatches.

    ``num_sms`` may be set at any time: calls use what it is then.
    """

    def __init__(self, case: Case, inputs: Inputs, traffic: Traffic, buffer: Buffer) -> None:
        self.case, self.inputs, self.traffic, self.buffer = case, inputs, traffic, buffer
        self.num_sms = buffer.comm.config.num_sms
        self.handles = {alignment: self._dispatch(inputs.x, alignment).handle for alignment in ALIGNMENTS}
        given = float8.quantize(inputs.x, Float8Cast())
        plain = [
            Format(name=case.dtype, x=inputs.x),
            Format(name="fp8 given", x=given.data, x_scales=given.scales),
            Format(name="fp8 cast", x=inputs.x, cast=Float8Cast()),
            Format(name="fp8 cast, power of two", x=inputs.x, cast=Float8Cast(scale_format="power_of_two")),
        ]
        in_heap = {id(x): self._in_heap(x) for x in (inputs.x, given.data)}
        self.formats = [
            (resident, dataclasses.replace(f, x=in_heap[id(f.x)]) if resident else f)
            for f in plain
            for resident in (True, False)
        ]

    def __iter__(self) -> Iterator[Variant]:
        for resident, rows in self.formats:
            for alignment in ALIGNMENTS:
                # Alignment 1 is there to compare with, once.
                if alignment != 1 or rows.name == self.case.dtype:
                    yield from self._dispatches(rows, alignment, resident)
        for alignment in (None, 128):
            for resident in (True, False):
                yield from self._combines(alignment, resident)

    def _in_heap(self, x: Tensor) -> Tensor:
        copy = self.buffer.symm_empty(x.shape[0], x.dtype)
        copy.view(torch.uint8).copy_(x.view(torch.uint8))
        return copy

    def _dispatch(self, x: Tensor, alignment: int | None, **more: object) -> DispatchResult:
        inputs = self.inputs
        layout = layout_of(alignment)
        return self.buffer.dispatch(
            x, inputs.topk_idx, inputs.topk_weights, layout=layout, num_sms=self.num_sms, **more
        )

    def _dispatches(self, rows: Format, alignment: int | None, resident: bool) -> Iterator[Variant]:
        buffer, handle = self.buffer, self.handles[alignment]
        room = (max(self.traffic.num_rows(alignment)) + 127) // 128 * 128
        calls: dict[str, Callable[[], object]] = {
            "cached": lambda: buffer.dispatch(rows.x, handle=handle, num_sms=self.num_sms, **rows.more),
            "fresh": lambda: self._dispatch(rows.x, alignment, **rows.more),
        }
        if rows.name == self.case.dtype and alignment != 1:
            calls["fixed"] = lambda: self._dispatch(rows.x, alignment, max_recv_tokens=room, **rows.more)
        moved = self.traffic.dispatch(rows.row_bytes, alignment)
        for plan, call in calls.items():
            yield Variant(
                name=f"dispatch {rows.name}, {layout_name(alignment)}, {plan}{', in heap' if resident else ''}",
                call=call,
                moved=moved,
                facts={
                    "operation": "dispatch",
                    "rows": rows.name,
                    "alignment": alignment,
                    "plan": plan,
                    "resident": resident,
                },
            )

    def _combines(self, alignment: int | None, resident: bool) -> Iterator[Variant]:
        handle = self.handles[alignment]
        rows = torch.randn(handle.num_rows, self.case.hidden, device="cuda").to(self.inputs.x.dtype)
        if resident:
            rows = self._in_heap(rows)
        for reduce in (None,) if alignment is None else ("fast", "exact"):
            how = "" if reduce is None else f", weighted, {reduce}"
            yield Variant(
                name=f"combine {self.case.dtype}, {layout_name(alignment)}{how}{', in heap' if resident else ''}",
                call=self._combine_call(rows, handle, reduce),
                moved=self.traffic.combine(self.case.hidden * rows.element_size(), reduce),
                facts={
                    "operation": "combine",
                    "rows": self.case.dtype,
                    "alignment": alignment,
                    "reduce": reduce,
                    "resident": resident,
                },
            )

    def _combine_call(self, rows: Tensor, handle: DispatchHandle, reduce: str | None) -> Callable[[], object]:
        if reduce is None:
            return lambda: self.buffer.combine(rows, handle, num_sms=self.num_sms)
        return lambda: self.buffer.combine(rows, handle, weighted=True, reduce=reduce, num_sms=self.num_sms)
