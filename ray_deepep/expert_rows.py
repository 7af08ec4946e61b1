"""``Buffer.combine_experts``: a combine from one tensor per local expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from . import checks
from .argument_checks import devices
from .handle import CombineResult, DispatchHandle

if TYPE_CHECKING:
    from .transport import BufferGeometry, CombineRequest, Transport


class ExpertRowCalls:
    """Mixed into :class:`~ray_deepep.Buffer`."""

    geometry: BufferGeometry
    _identity: int
    _transport: Transport
    _check_open: Callable[[str], None]
    _combine: Callable[[CombineRequest], CombineResult]

    def combine_experts(
        self,
        expert_rows: Sequence[torch.Tensor],
        handle: DispatchHandle,
        *,
        topk_weights: torch.Tensor | None = None,
        weighted: bool = False,
        reduce: str = "exact",
        keep_routes: bool = False,
        bias: torch.Tensor | None = None,
        num_sms: int | None = None,
    ) -> CombineResult:
        """As :meth:`combine`, from one tensor per local expert, so that nobody has to put them together; collective.

        On CPUs rows are read from where they are. On other transports the buffer puts them together.

        Args:
            expert_rows: L tensors, float32, bfloat16 or float16, all of one dtype, contiguous: what ``handle.split``
                cuts a tensor ``[S, H]`` into. Expert-major: ``[rows of the expert's group, H]``, its aligned tail
                included. Padded: ``[N * capacity, H]``, by source rank. Not for token-major rows, and not with
                ``max_recv_tokens``. Ranks may differ in which of the two methods they call.
            handle, topk_weights, weighted, reduce, keep_routes, bias, num_sms: as for :meth:`combine`.

        Raises:
            As :meth:`combine`.
        """
        self._check_open("combine_experts")
        checks.call_options(num_sms, None)
        checks.expert_rows(self.geometry, expert_rows, handle=handle, owner=self._identity)
        devices(self._transport.device, expert_rows=expert_rows[0], topk_weights=topk_weights, bias=bias)
        request = checks.combine_request(
            self.geometry,
            rows=None if self._transport.takes_expert_rows else handle.join(expert_rows),
            expert_rows=tuple(expert_rows) if self._transport.takes_expert_rows else (),
            handle=handle,
            owner=self._identity,
            topk_weights=topk_weights,
            weighted=weighted,
            reduce=reduce,
            keep_routes=keep_routes,
            bias=bias,
            num_sms=num_sms,
        )
        return self._combine(request)
