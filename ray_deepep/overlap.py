"""Room for operations beside matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .argument_checks import at_least_one


@contextlib.contextmanager
def leave_sms(num_sms: int) -> Iterator[None]:
    """Matrix products called inside leave multiprocessors free, for operations with ``async_op`` beside them.

    A product's kernel otherwise takes all of them and keeps them to its end, so that an operation that starts a little
    later waits for the whole product, however few it asks for. Products inside go through cuBLASLt, which can be told.
    These are settings of torch for the process, not of a thread. Without GPUs nothing changes.

        work = buffer.dispatch(x, topk_idx, num_sms=8, async_op=True)
        with ray_deepep.leave_sms(8):
            y = a @ b
        arrived = work.wait()

    Args:
        num_sms: as many as the operation takes.

    Raises:
        InvalidArgumentError, InvalidTypeError: ``num_sms`` is not an int of 1 or more.
    """
    at_least_one("num_sms", num_sms)
    if torch.version.cuda is None:
        yield
        return
    library, left = torch.backends.cuda.preferred_blas_library(), torch._C._get_sm_carveout_experimental()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch._C._set_sm_carveout_experimental(num_sms)
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(left)
        torch.backends.cuda.preferred_blas_library(library)
