"""``enable``, ``attach``, ``close``: what is swapped when, what is shared and freed, and when stock runs instead."""

from __future__ import annotations

import copy
import gc
import pickle

import deepspeed
import pytest
import torch
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed_cases import (
    HIDDEN,
    LayerCase,
    differences,
    make_layer,
    start_deepspeed,
    step,
    swap_config,
)
from harness import RankContext, Ranks, error_of

from ray_deepep import Communicator, InvalidArgumentError, InvalidTypeError
from ray_deepep.deepspeed import SwapConfig, attach, enable
from ray_deepep.deepspeed.switch import ForwardSwitch

CASE = LayerCase()
REFERENCE = "reference"


def test_config_defaults_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (SwapConfig().layout, SwapConfig().combine) == ("padded", "auto")
    monkeypatch.setenv("RAY_DEEPEP_LAYOUT", "compact")
    monkeypatch.setenv("RAY_DEEPEP_COMBINE", "fast")
    monkeypatch.setenv("RAY_DEEPEP_DEADLINE_S", "7")
    config = SwapConfig()
    assert (config.layout, config.combine, config.comm.deadline_s) == ("compact", "fast", 7.0)
    assert pickle.loads(pickle.dumps(config)) == config


def test_config_rules() -> None:
    error = error_of(InvalidArgumentError, lambda: SwapConfig(layout="dense"))
    assert str(error) == "layout: must be one of padded, compact; got 'dense'"
    error = error_of(InvalidArgumentError, lambda: SwapConfig(combine="sum"))
    assert str(error) == "combine: must be one of auto, exact, fast; got 'sum'"
    error = error_of(InvalidTypeError, lambda: SwapConfig(comm={"transport": "shm"}))
    assert str(error) == "comm: must be a CommConfig; got 'dict'"


def test_enable_and_close_without_a_group() -> None:
    """Nothing collective happens before the first forward."""
    stock = MOELayer.forward
    with enable() as swap:
        assert ForwardSwitch.current().whole is swap and MOELayer.forward is not stock
        assert MOELayer.forward.__wrapped__ is stock
        assert enable() is swap and enable(SwapConfig()) is swap
        error = error_of(InvalidArgumentError, lambda: enable(SwapConfig(layout="compact")))
        assert error.argument == "config" and "close it first" in str(error)
        assert swap.buffers == () and swap.comm_stats()["num_calls"] == 0
    assert swap.closed and MOELayer.forward is stock and ForwardSwitch.current() is None
    swap.close()
    with enable(SwapConfig(layout="compact")) as again:
        assert again is not swap


def test_attach_rules() -> None:
    assert error_of(InvalidTypeError, lambda: attach("model")).argument == "engine_or_model"
    error = error_of(InvalidArgumentError, lambda: attach(torch.nn.Linear(2, 2)))
    assert str(error) == "engine_or_model: must contain a deepspeed.moe layer; got 'Linear'"
    assert ForwardSwitch.current() is None


def check_shared_buffers(context: RankContext, transport: str) -> None:
    """Six layers of one geometry share a buffer, others have their own; closing frees all and stock runs again."""
    start_deepspeed()
    layers = [make_layer(LayerCase(seed=seed)) for seed in range(6)]
    other = make_layer(LayerCase(k=1))
    keys = list(layers[0].state_dict())
    expected = step(CASE, layers)
    with enable(swap_config(transport)) as swap:
        seen = step(CASE, layers)
        assert len(swap.buffers) == 1 and len(swap.communicators) == 1
        assert swap.communicators[0].transport == transport
        step(CASE, [*layers, other])
        assert len(swap.buffers) == 2 and len(swap.communicators) == 1
        buffers = swap.buffers
        assert list(layers[0].state_dict()) == keys and type(layers[0].deepspeed_moe) is MOELayer
    assert not differences(expected, seen)
    assert all(buffer.closed for buffer in buffers) and swap.buffers == swap.communicators == ()
    assert not differences(expected, step(CASE, layers))


def test_one_buffer_for_layers_of_one_geometry(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_shared_buffers, transport)


def check_stats(context: RankContext, transport: str) -> None:
    """Forward and backward count; bytes are those of the rows; a reset starts again; closed buffers still count."""
    start_deepspeed()
    layer = make_layer(CASE)
    swap = enable(swap_config(transport))
    step(CASE, layer)
    stats = swap.comm_stats(reset=True)
    capacity = 64 // CASE.num_experts * CASE.k
    rows, source = CASE.num_experts * capacity * HIDDEN * 4, 64 * HIDDEN * 4
    assert set(stats) == {"dispatch_ms", "combine_ms", "num_calls", "dispatch_bytes", "combine_bytes"}
    assert stats["num_calls"] == 4 and stats["dispatch_ms"] > 0 and stats["combine_ms"] > 0
    assert stats["dispatch_bytes"] == stats["combine_bytes"] == 2 * rows > source
    assert swap.comm_stats()["num_calls"] == 0
    step(CASE, layer)
    swap.close()
    assert swap.comm_stats()["num_calls"] == 4


def test_comm_stats(ranks: Ranks, transport: str) -> None:
    ranks.run(2, check_stats, transport)


def check_attach(context: RankContext) -> None:
    """One model runs over the swap, another one and a copy of the first stay stock."""
    start_deepspeed()
    mine, theirs = make_layer(CASE, groups=False), make_layer(CASE)
    expected = step(CASE, theirs)
    with attach(torch.nn.Sequential(mine), swap_config(REFERENCE, "compact")) as swap:
        twin = copy.deepcopy(mine)
        for layer in (mine, twin):
            layer.set_deepspeed_parallelism()
        assert not differences(step(CASE, theirs), expected)
        assert not differences(step(CASE, twin), expected)
        assert swap.comm_stats()["num_calls"] == 0
        compact = step(CASE, mine)
        assert swap.comm_stats()["num_calls"] == 4
        assert not differences(expected, compact, atol=2e-6)
        error = error_of(InvalidArgumentError, lambda: attach(mine))
        assert "close that swap first" in str(error)
        # A swap of the process does not touch an attached model.
        with enable(swap_config(REFERENCE)) as whole:
            step(CASE, mine)
            assert swap.comm_stats()["num_calls"] == 8 and whole.comm_stats()["num_calls"] == 0
            step(CASE, theirs)
            assert swap.comm_stats()["num_calls"] == 8 and whole.comm_stats()["num_calls"] == 4
    assert ForwardSwitch.current() is None
    assert not differences(step(CASE, mine), expected)


def test_attach_touches_one_model(ranks: Ranks) -> None:
    ranks.run(2, check_attach)


def check_collected(context: RankContext) -> None:
    start_deepspeed()
    layer = make_layer(CASE)
    swap = attach(layer, swap_config(REFERENCE))
    step(CASE, layer)
    (buffer,) = swap.buffers
    del layer
    gc.collect()
    assert swap.closed and buffer.closed and ForwardSwitch.current() is None


def test_attached_swap_ends_with_its_model(ranks: Ranks) -> None:
    ranks.run(2, check_collected)


def make_engine(layer: torch.nn.Module) -> deepspeed.DeepSpeedEngine:
    config = {"train_micro_batch_size_per_gpu": 1}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    return deepspeed.initialize(model=layer, optimizer=optimizer, config=config)[0]


def check_engine_destroyed(context: RankContext, process_wide: bool) -> None:
    """Freed with the engine; under ``enable()`` a buffer that another model uses stays."""
    start_deepspeed()
    layer, other = (make_layer(CASE, groups=False) for _ in range(2))
    engine, second = make_engine(layer), make_engine(other)
    swap = enable(swap_config(REFERENCE)) if process_wide else attach(engine, swap_config(REFERENCE))
    step(CASE, layer)
    step(CASE, other)
    (buffer,) = swap.buffers
    engine.destroy()
    assert swap.closed == buffer.closed == (not process_wide)
    if process_wide:
        second.destroy()
        assert buffer.closed and swap.buffers == () and swap.comm_stats()["num_calls"] == 8
        # The swap itself is open: layers that run again get a new buffer.
        step(CASE, other)
        assert len(swap.buffers) == 1
        swap.close()
    assert ForwardSwitch.current() is None
    assert "ray_deepep" not in deepspeed.DeepSpeedEngine.destroy.__module__


@pytest.mark.parametrize("process_wide", (True, False), ids=("enable", "attach"))
def test_freed_with_the_engine(ranks: Ranks, process_wide: bool) -> None:
    ranks.run(2, check_engine_destroyed, process_wide)


def check_collected_engine(context: RankContext) -> None:
    """When Python collects an engine differs between ranks, so under ``enable()`` that frees nothing."""
    start_deepspeed()
    layer = make_layer(CASE, groups=False)
    engine = make_engine(layer)
    with enable(swap_config(REFERENCE)) as swap:
        step(CASE, layer)
        if context.rank == 0:
            # What a collection calls. A real one comes with the layers, which hold the engine by their hooks.
            engine.__del__()
        assert len(swap.buffers) == 1
        step(CASE, layer)
        engine.destroy()
        assert swap.buffers == ()


def test_collected_engine_frees_nothing(ranks: Ranks) -> None:
    ranks.run(2, check_collected_engine)


def check_adopt(context: RankContext) -> None:
    start_deepspeed()
    comm = swap_config(REFERENCE).comm
    communicator = Communicator.from_process_group(config=comm)
    layer = make_layer(CASE)
    with enable(swap_config(REFERENCE)) as swap:
        error = error_of(InvalidArgumentError, lambda: swap.adopt(communicator, [0]))
        assert str(error) == "ranks: must name each of the communicator's 2 ranks once; got (0,)"
        assert error_of(InvalidTypeError, lambda: swap.adopt("it", [0, 1])).argument == "communicator"
        swap.adopt(communicator, [0, 1])
        error = error_of(InvalidArgumentError, lambda: swap.adopt(communicator, [0, 1]))
        assert "already have a communicator" in str(error)
        step(CASE, layer)
        assert swap.communicators == (communicator,) and swap.buffers[0].comm is communicator
    assert communicator.closed


def test_adopted_communicator(ranks: Ranks) -> None:
    ranks.run(2, check_adopt)


def check_expert_data_groups(context: RankContext, transport: str) -> None:
    """Two EP groups in one world, and layers of two EP sizes: one communicator and buffer each."""
    start_deepspeed()
    pairs, four = make_layer(LayerCase(ep_size=2)), make_layer(LayerCase(ep_size=4))
    with enable(swap_config(transport)) as swap:
        step(CASE, [pairs, four, pairs])
        sizes = [communicator.num_ranks for communicator in swap.communicators]
        assert sizes == [2, 4] and len(swap.buffers) == 2


def test_expert_data_groups(ranks: Ranks, transport: str) -> None:
    ranks.run(4, check_expert_data_groups, transport)
