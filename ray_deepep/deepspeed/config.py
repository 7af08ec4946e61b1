"""Frozen settings of a swap. Defaults come from the environment (see ``ray_deepep/env.py``) when the object is made."""

from __future__ import annotations

import dataclasses

from .. import env
from ..config import CommConfig
from ..errors import InvalidTypeError
from ..fields import check_choice, known_fields

LAYOUTS = ("padded", "compact")
COMBINES = ("auto", "exact", "fast")
EXPERTS = ("auto", "loop", "grouped")
GRAPHS = ("auto", "off")


@known_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class SwapConfig:
    """How swapped layers move rows; the same on every rank."""

    layout: str = dataclasses.field(default_factory=env.layout)
    """``padded``: experts see ``[ep_size, 1, C, M]`` as stock, zero where no token was routed. ``compact``: each expert
    sees its real rows alone, ``[1, 1, n, M]``, in order of (source rank, token)."""
    combine: str = dataclasses.field(default_factory=env.combine)
    """``exact``: every route's row goes home and is weighted and added there in float32, in k order, as stock does.
    ``fast``: routes of a token that meet on a rank are added there first, and one row goes home; rounds differently.
    ``auto``: fast where experts are grouped, whose products round differently anyway, and else exact."""
    experts: str = dataclasses.field(default_factory=env.experts)
    """``loop``: local experts are called one after the other, as stock. ``grouped``: where all are built alike, of
    linear layers and elementwise functions alone, each linear layer is one grouped product over the experts' real rows
    (whatever ``layout`` says); rounds differently. ``auto``: grouped on GPUs, for bfloat16, and loop on CPUs."""
    graphs: str = dataclasses.field(default_factory=env.graphs)
    """``auto``: in training on GPUs, where experts are grouped and gates drop what is above their capacity, forward and
    backward of a layer are captured into CUDA graphs at its fourth call and replayed from then on. Calls that a graph
    cannot stand for (other shapes, hooks inside the layer, activation checkpointing, a second forward before the
    backward) are made one by one, as with ``off``; so are those of layers whose graphs would take more than half of the
    GPU memory that was free until then. Ranks whose layers get different numbers of tokens set ``off``, unless they
    differ from the beginning."""
    comm: CommConfig = dataclasses.field(default_factory=CommConfig)
    """Settings of the communicators that the swap makes."""

    def __post_init__(self) -> None:
        for name, allowed in (("layout", LAYOUTS), ("combine", COMBINES), ("experts", EXPERTS), ("graphs", GRAPHS)):
            check_choice(name, getattr(self, name), allowed)
        if not isinstance(self.comm, CommConfig):
            raise InvalidTypeError("comm", type(self.comm).__name__, "must be a CommConfig")
