"""Room for ``Buffer.symm_empty``: the pool's arithmetic, its errors, its threads, and the tensors of CPUs."""

from __future__ import annotations

import gc
import itertools
import random
import threading

import pytest
import torch
from harness import RankContext, Ranks, error_of

from ray_deepep import Buffer, ClosedError, HeapFullError, InvalidArgumentError, InvalidTypeError
from ray_deepep.symm_pool import BLOCK_BYTES, Block, SymmPool

ADDRESS = 1 << 32
GEOMETRY = {"num_experts": 4, "hidden": 128, "num_topk": 2, "max_tokens": 8}


def span(block: Block) -> tuple[int, int]:
    """First address, and the first after it."""
    rounded = (block.num_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
    return block.address, block.address + rounded


def test_first_fit_and_joined_neighbours() -> None:
    pool = SymmPool(ADDRESS, 4 * BLOCK_BYTES)
    blocks = [pool.take(size) for size in (1, BLOCK_BYTES, BLOCK_BYTES + 1)]
    assert [b.address - ADDRESS for b in blocks] == [0, BLOCK_BYTES, 2 * BLOCK_BYTES]
    assert pool.free_bytes() == 0
    del blocks[0]
    assert pool.take(BLOCK_BYTES).address == ADDRESS
    # The first two, given back in either order, make one piece.
    blocks.clear()
    gc.collect()
    assert pool.free_bytes() == 4 * BLOCK_BYTES
    assert pool.take(4 * BLOCK_BYTES).address == ADDRESS


def test_a_block_lives_as_long_as_what_refers_to_it() -> None:
    pool = SymmPool(ADDRESS, BLOCK_BYTES)
    block = pool.take(16)
    other = block
    del block
    assert pool.free_bytes() == 0
    interface = other.__cuda_array_interface__
    assert (interface["data"], interface["shape"], interface["typestr"]) == ((ADDRESS, False), (16,), "|u1")
    del other
    assert pool.free_bytes() == BLOCK_BYTES


def test_full() -> None:
    pool = SymmPool(ADDRESS, 4 * BLOCK_BYTES + 100)
    kept = [pool.take(1) for _ in range(4)]
    del kept[0], kept[1]
    error = error_of(HeapFullError, lambda: pool.take(BLOCK_BYTES + 1))
    assert (error.asked, error.free, error.largest) == (1024, 1024, 512)
    assert error.symm_bytes == 4 * BLOCK_BYTES + 100
    # An error takes nothing.
    assert pool.free_bytes() == 1024
    assert error_of(HeapFullError, lambda: SymmPool(ADDRESS, 0).take(1)).free == 0


def test_holds() -> None:
    pool = SymmPool(ADDRESS, 1000)
    assert [pool.holds(ADDRESS + at) for at in (-1, 0, 999, 1000)] == [False, True, True, False]


def check_random_blocks(pool: SymmPool, seed: int, taken: list[Block], lock: threading.Lock) -> None:
    """Blocks of all threads never overlap."""
    generator = random.Random(seed)
    mine: list[Block] = []
    for _ in range(300):
        if mine and generator.random() < 0.5:
            block = mine.pop(generator.randrange(len(mine)))
            with lock:
                taken.remove(block)
            del block
            continue
        try:
            block = pool.take(generator.randint(1, 5 * BLOCK_BYTES))
        except HeapFullError:
            continue
        with lock:
            taken.append(block)
            spans = sorted(map(span, taken))
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans)), spans
        mine.append(block)
        del block
    with lock:
        for block in mine:
            taken.remove(block)


def test_threads_share_a_pool() -> None:
    pool, taken, lock = SymmPool(ADDRESS, 64 * BLOCK_BYTES), [], threading.Lock()
    failures: list[BaseException] = []

    def body(seed: int) -> None:
        try:
            check_random_blocks(pool, seed, taken, lock)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=body, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and not taken
    gc.collect()
    assert pool.free_bytes() == 64 * BLOCK_BYTES
    assert pool.take(64 * BLOCK_BYTES).address == ADDRESS


def check_on_cpu(context: RankContext, transport: str) -> list[str]:
    with context.buffer(transport, symm_bytes=1 << 16, **GEOMETRY) as buffer:
        x = buffer.symm_empty(3, torch.float32)
        assert (x.shape, x.dtype, x.device.type) == ((3, 128), torch.float32, "cpu")
        assert buffer.symm_empty(0).shape == (0, 128) and buffer.symm_empty(1).dtype == torch.bfloat16
        x.fill_(context.rank + 1)
        result = buffer.dispatch(x, torch.full((3, 1), 0))
        rows = buffer.symm_empty(result.handle.num_rows, torch.float32)
        rows.copy_(result.x)
        assert torch.equal(buffer.combine(rows, result.handle).x, x)
        messages = [str(error_of(error, lambda a=a: buffer.symm_empty(*a))) for error, a in BAD_ROWS]
    return [*messages, str(error_of(ClosedError, lambda: buffer.symm_empty(1)))]


BAD_ROWS = (
    (InvalidArgumentError, (-1, torch.float32)),
    (InvalidTypeError, (2.5, torch.float32)),
    (InvalidTypeError, (True, torch.float32)),
    (InvalidTypeError, (2, torch.int32)),
)


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_on_cpus(ranks: Ranks, transport: str, num_ranks: int) -> None:
    want = [
        "num_rows: must be >= 0; got -1",
        "num_rows: must be an int; got 'float'",
        "num_rows: must be an int; got 'bool'",
        "dtype: must be one of float32, bfloat16, float16, float8_e4m3fn; got 'torch.int32'",
        "symm_empty: the buffer is closed",
    ]
    assert ranks.run(num_ranks, check_on_cpu, transport) == [want] * num_ranks


def negative(context: RankContext) -> str:
    call = lambda: Buffer(context.communicator("shm"), symm_bytes=-1, **GEOMETRY)  # noqa: E731
    return str(error_of(InvalidArgumentError, call))


def test_negative_size(ranks: Ranks) -> None:
    assert ranks.run(1, negative) == ["symm_bytes: must be >= 0; got -1"]
