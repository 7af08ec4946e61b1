"""``max_recv_tokens`` for transports whose host knows what came: outputs are cut or padded to the asked rows.

The CUDA core does the same on the device, without telling the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .transport import DispatchOutput


def fit_rows(values: torch.Tensor, num_rows: int, fill: int = 0) -> torch.Tensor:
    """``values`` ``[S, ...]`` with ``num_rows`` rows: the first ones, or all and then rows of ``fill``."""
    missing = num_rows - len(values)
    if missing <= 0:
        return values[:num_rows]
    # Bytes, for torch cannot fill and concatenate float8.
    if values.dtype == torch.float8_e4m3fn:
        return fit_rows(values.view(torch.uint8), num_rows, fill).view(values.dtype)
    return torch.cat([values, values.new_full((missing, *values.shape[1:]), fill)])


def _fit(values: torch.Tensor | None, num_rows: int, fill: int = 0) -> torch.Tensor | None:
    return None if values is None else fit_rows(values, num_rows, fill)


def fit_output(output: DispatchOutput, max_recv_tokens: int | None, *, token_major: bool) -> DispatchOutput:
    """The output with ``max_recv_tokens`` rows, as CUDA's host sees it; unchanged where that is None."""
    if max_recv_tokens is None:
        return output
    return dataclasses.replace(
        output,
        x=fit_rows(output.x, max_recv_tokens),
        x_scales=_fit(output.x_scales, max_recv_tokens),
        topk_idx=_fit(output.topk_idx, max_recv_tokens, fill=-1),
        topk_weights=_fit(output.topk_weights, max_recv_tokens),
        num_recv_tokens=max_recv_tokens if token_major else None,
        num_recv_tokens_per_expert=None,
        expert_offsets=None,
    )


def host_counts(
    *,
    rank: int,
    num_recv_tokens: int,
    num_rows: int,
    num_recv_tokens_per_expert: Sequence[int],
    expert_offsets: Sequence[int],
    max_recv_tokens: int | None,
    device: torch.device,
) -> torch.Tensor:
    """``DispatchHandle.counts`` from what the host knows. Of overflows it knows this rank's."""
    overflow = max_recv_tokens is not None and num_rows > max_recv_tokens
    offsets = expert_offsets or [0] * (len(num_recv_tokens_per_expert) + 1)
    head = (num_recv_tokens, num_rows, rank + 1 if overflow else 0, num_rows if overflow else 0)
    return torch.tensor([*head, *num_recv_tokens_per_expert, *offsets], dtype=torch.int32, device=device)
