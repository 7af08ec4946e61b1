"""MoE layers as CUDA graphs, against the same layers call by call: outputs and all gradients, step after step.

tests/gpu/run.sh tests/gpu/test_cuda_layer_graphs.py
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest
import torch
from harness import CASE_CONFIG, RankContext, Ranks, error_of
from torch.utils.checkpoint import checkpoint

from ray_deepep.cuda import cuda_problem

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed here")
pytestmark = pytest.mark.skipif(bool(cuda_problem()), reason=f"transport cuda: {cuda_problem()}")

NUM_STEPS = 8
DEADLINE_S = 3.0
Results = dict[str, torch.Tensor]


class Runner:
    """A layer of this rank with an optimizer; each ``step`` adds its outcomes to ``results``."""

    def __init__(self, context: RankContext, case: object, swap: object) -> None:
        import deepspeed_cases as ds

        self.rank, self.case, self.swap = context.rank, case, swap
        self.layer = ds.make_layer(case).to("cuda")
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.1)
        self.results: Results = {}
        self.num_graphed = 0

    @property
    def graphs(self) -> object | None:
        """The layer's graphs, if there are any."""
        found = self.swap._registry.graphs._of.get(self.layer.deepspeed_moe)
        return None if found is None else found.captured

    def inputs(self, number: int, num_tokens: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        """Fresh for each number and rank."""
        generator = torch.Generator().manual_seed(100 * number + self.rank)
        hidden = self.layer.deepspeed_moe.gate.wg.weight.shape[1]
        x, grad = torch.randn(2, num_tokens, hidden, generator=generator).to("cuda", torch.bfloat16)
        return x.requires_grad_(), grad

    def forward(self, x: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and ``l_aux``; random numbers of gates are those of the step."""
        torch.manual_seed(number)
        out, l_aux, exp_counts = self.layer(x)
        self.results[f"{number}.exp_counts"] = exp_counts.clone()
        return out, l_aux

    def keep(self, number: int, out: torch.Tensor, l_aux: torch.Tensor, x: torch.Tensor) -> None:
        """What came of a step, gradients of parameters too."""
        kept = {"y": out, "l_aux": l_aux, "x.grad": x.grad}
        # Where a gradient was not asked for, there is none, or zeros.
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.layer.named_parameters()}
        kept |= {f"{name}.grad": grad for name, grad in grads.items()}
        self.results |= {f"{number}.{name}": value.detach().clone() for name, value in kept.items()}

    def step(self, number: int, num_tokens: int = 64, update: bool = True) -> None:
        """Forward, backward and update. Freed blocks are full of NaN: what is read must have been written."""
        block = torch.full((1 << 20,), float("nan"), device="cuda")
        del block
        x, grad = self.inputs(number, num_tokens)
        out, l_aux = self.forward(x, number)
        ((out * grad).float().sum() + l_aux).backward()
        self.keep(number, out, l_aux, x)
        if update:
            self.optimizer.step()
            self.optimizer.zero_grad()


def compare(
    context: RankContext, run: Callable[[Runner], None], expected_graphs: bool, combine: str, fields: dict[str, object]
) -> list[str]:
    """Differences of what ``run`` does with graphs and without."""
    import deepspeed_cases as ds

    from ray_deepep import CommConfig
    from ray_deepep.deepspeed import SwapConfig, enable

    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    ds.start_deepspeed()
    case = ds.LayerCase(ep_size=context.num_ranks, dtype=torch.bfloat16, **fields)
    comm = CommConfig(**{**CASE_CONFIG, "transport": "cuda", "device_heap_gib": 0.05})
    results = []
    for graphs in ("off", "auto"):
        with enable(SwapConfig(combine=combine, experts="grouped", graphs=graphs, comm=comm)) as swap:
            runner = Runner(context, case, swap)
            run(runner)
            torch.cuda.synchronize()
            for buffer in swap.buffers:
                buffer.check()
            assert (runner.graphs is not None) == (graphs == "auto" and expected_graphs)
            results.append(runner.results)
    return ds.differences(*results)


def steps(runner: Runner) -> None:
    """Training."""
    for number in range(NUM_STEPS):
        runner.step(number)


@pytest.mark.parametrize("combine", ("exact", "fast"))
@pytest.mark.parametrize("k", (1, 2, 4))
@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_training(ranks: Ranks, num_ranks: int, k: int, combine: str) -> None:
    """Gates that draw at random (top-1 and top-2) draw the same."""
    for differences in ranks.run(num_ranks, compare, steps, True, combine, {"k": k}, deadline_s=120.0):
        assert differences == []


def accumulated(runner: Runner) -> None:
    """Two backwards before an update: gradients are added up, not overwritten."""
    for number in range(NUM_STEPS):
        runner.step(number, update=number % 2 == 1)


def in_flight(runner: Runner) -> None:
    """A second forward before the first one's backward, as pipelines make; either order of backwards."""
    steps(runner)
    for number in (20, 30):
        pairs = [runner.inputs(number + i) for i in range(2)]
        outs = [runner.forward(x, number + i) for i, (x, _) in enumerate(pairs)]
        for i in (0, 1) if number == 20 else (1, 0):
            (x, grad), (out, l_aux) = pairs[i], outs[i]
            ((out * grad).float().sum() + l_aux).backward()
            runner.keep(number + i, out, l_aux, x)


def without_backward(runner: Runner) -> None:
    """Forwards whose results nobody uses, in training and in evaluation, and an input without a gradient."""
    steps(runner)
    for number in (20, 21):
        runner.forward(runner.inputs(number)[0], number)
        runner.layer.eval()
        with torch.no_grad():
            runner.results[f"{number}.eval"] = runner.forward(runner.inputs(number)[0], 10 * number)[0]
        runner.layer.train()
        out, _ = runner.forward(runner.inputs(number)[0].detach(), 11 * number)
        (out.float() ** 2).sum().backward()
        runner.step(number)


def one_gradient_only(runner: Runner) -> None:
    """Only the output, or only ``l_aux``, has a gradient."""
    steps(runner)
    for number in (20, 21):
        x, grad = runner.inputs(number)
        out, l_aux = runner.forward(x, number)
        (l_aux if number == 20 else (out * grad).float().sum()).backward()
        runner.keep(number, out, l_aux, x)


def other_sizes(runner: Runner) -> None:
    """Fewer tokens on one rank while the others replay; fewer and more on all, which take a larger buffer."""
    steps(runner)
    for number, num_tokens in enumerate((64, 64 - 8 * runner.rank, 32, 96, 64, 64, 64), start=20):
        runner.step(number, num_tokens)


def more_amid_a_step(runner: Runner) -> None:
    """The buffer is outgrown between a replayed forward and its backward, which is then over the old one."""
    steps(runner)
    x, grad = runner.inputs(20)
    out, l_aux = runner.forward(x, 20)
    runner.layer.eval()
    with torch.no_grad():
        runner.results["21.eval"] = runner.forward(runner.inputs(21, 160)[0], 21)[0]
    runner.layer.train()
    ((out * grad).float().sum() + l_aux).backward()
    runner.keep(20, out, l_aux, x)
    for number in range(22, 26):
        runner.step(number)


def other_settings(runner: Runner) -> None:
    """The gate's capacity, frozen experts, hooks, and parameters that moved."""
    steps(runner)
    moe = runner.layer.deepspeed_moe
    moe.gate.capacity_factor = 2.0
    runner.step(20)
    moe.gate.capacity_factor = 0.5
    runner.step(21)
    moe.gate.capacity_factor = 1.0
    seen = []
    hook = moe.gate.register_forward_hook(lambda *_: seen.append(1))
    runner.step(22)
    assert len(seen) == 1, "the hook was left out"
    hook.remove()
    for parameter in moe.experts.parameters():
        parameter.data = parameter.data.clone()
    for number in range(23, 26):
        runner.step(number)


def checkpointed(runner: Runner, reentrant: bool) -> None:
    """The forward is computed again in the backward."""
    for number in range(NUM_STEPS):
        x, grad = runner.inputs(number)
        torch.manual_seed(number)
        out, l_aux, _ = checkpoint(runner.layer, x, use_reentrant=reentrant)
        ((out * grad).float().sum() + l_aux).backward()
        runner.keep(number, out, l_aux, x)
        runner.optimizer.step()
        runner.optimizer.zero_grad()


def checkpointed_reentrant(runner: Runner) -> None:
    checkpointed(runner, True)


def checkpointed_by_hooks(runner: Runner) -> None:
    checkpointed(runner, False)


@pytest.mark.parametrize(
    ("run", "expected_graphs"),
    [
        (accumulated, True),
        (in_flight, True),
        (without_backward, True),
        (one_gradient_only, True),
        (other_sizes, True),
        (more_amid_a_step, True),
        (other_settings, True),
        (checkpointed_reentrant, False),
        (checkpointed_by_hooks, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("num_ranks", (1, 2))
def test_other_ways(ranks: Ranks, num_ranks: int, run: Callable[[Runner], None], expected_graphs: bool) -> None:
    for differences in ranks.run(num_ranks, compare, run, expected_graphs, "fast", {"k": 4}, deadline_s=120.0):
        assert differences == []


def uneven(runner: Runner) -> None:
    """Another number of tokens on each rank, from the beginning."""
    for number in range(NUM_STEPS):
        runner.step(number, 64 - 16 * runner.rank)


def test_uneven_ranks_run_without_graphs(ranks: Ranks) -> None:
    for differences in ranks.run(2, compare, uneven, False, "fast", {"k": 4}, deadline_s=120.0):
        assert differences == []


def test_gates_that_drop_nothing_run_without_graphs(ranks: Ranks) -> None:
    for differences in ranks.run(2, compare, steps, False, "fast", {"k": 4, "drop_tokens": False}, deadline_s=120.0):
        assert differences == []


@dataclasses.dataclass(frozen=True)
class Counted:
    """What a swap says of its calls."""

    num_calls: tuple[int, int]
    timed: bool
    dispatch_ms: float
    combine_ms: float


def counted(context: RankContext, graphs: str) -> Counted:
    import deepspeed_cases as ds

    from ray_deepep import CommConfig
    from ray_deepep.deepspeed import SwapConfig, enable

    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    ds.start_deepspeed()
    case = ds.LayerCase(ep_size=context.num_ranks, dtype=torch.bfloat16, k=4)
    settings = {"transport": "cuda", "device_heap_gib": 0.05, "time_gpu_calls": True}
    comm = CommConfig(**{**CASE_CONFIG, **settings})
    with enable(SwapConfig(experts="grouped", graphs=graphs, comm=comm)) as swap:
        runner = Runner(context, case, swap)
        for number in range(5):
            runner.step(number)
        torch.cuda.synchronize()
        swap.stats(reset=True)
        for number in range(5, 5 + NUM_STEPS):
            runner.step(number)
            torch.cuda.synchronize()
        stats = swap.stats()
        return Counted((stats.num_dispatch, stats.num_combine), stats.timed, stats.dispatch_ms, stats.combine_ms)


@pytest.mark.parametrize("num_ranks", (1, 2))
def test_replays_are_counted_and_timed(ranks: Ranks, num_ranks: int) -> None:
    """As calls are: the times are of the same size."""
    off, auto = (ranks.run(num_ranks, counted, graphs, deadline_s=120.0) for graphs in ("off", "auto"))
    for one, other in zip(off, auto):
        assert one.num_calls == other.num_calls == (2 * NUM_STEPS, 2 * NUM_STEPS)
        assert other.timed and other.dispatch_ms > 0 and other.combine_ms > 0
        # Shared GPUs and first calls apart, an operation takes some ten microseconds.
        assert other.dispatch_ms < 100 * one.dispatch_ms and other.combine_ms < 100 * one.combine_ms


def late_rank(context: RankContext) -> tuple[int, float]:
    """The rank that is blamed, and seconds until then, where one stays away from a replay; rank 1 is that one."""
    import deepspeed_cases as ds

    from ray_deepep import CommConfig, CommFaultError
    from ray_deepep.deepspeed import SwapConfig, enable

    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    ds.start_deepspeed()
    case = ds.LayerCase(ep_size=context.num_ranks, dtype=torch.bfloat16, k=4)
    settings = {"transport": "cuda", "device_heap_gib": 0.05, "deadline_s": DEADLINE_S}
    with enable(SwapConfig(experts="grouped", comm=CommConfig(**{**CASE_CONFIG, **settings}))) as swap:
        runner = Runner(context, case, swap)
        steps(runner)
        torch.cuda.synchronize()
        if context.rank == 1:
            time.sleep(DEADLINE_S + 2)
            return -1, 0.0
        begin = time.monotonic()
        runner.step(20)
        # The replays have been launched; whoever waits for the GPU waits as long as its kernels do.
        torch.cuda.synchronize()
        error = error_of(CommFaultError, lambda: runner.step(21))
        return error.record.peer, time.monotonic() - begin


def test_a_rank_that_stays_away_from_a_replay_is_blamed(ranks: Ranks) -> None:
    (blamed, seconds), _ = ranks.run(2, late_rank, deadline_s=120.0)
    assert blamed == 1
    assert seconds < 2 * DEADLINE_S


def backwards_that_cannot_be(context: RankContext) -> list[str]:
    """What a second backward of one forward says, and one after the swap is closed."""
    import deepspeed_cases as ds

    from ray_deepep import ClosedError, CommConfig
    from ray_deepep.deepspeed import SwapConfig, enable

    torch.cuda.set_device(context.rank % torch.cuda.device_count())
    ds.start_deepspeed()
    case = ds.LayerCase(ep_size=context.num_ranks, dtype=torch.bfloat16, k=4)
    comm = CommConfig(**{**CASE_CONFIG, "transport": "cuda", "device_heap_gib": 0.05})
    said = []
    with enable(SwapConfig(experts="grouped", comm=comm)) as swap:
        runner = Runner(context, case, swap)
        steps(runner)
        out, _ = runner.forward(runner.inputs(20)[0], 20)
        loss = out.float().sum()
        loss.backward(retain_graph=True)
        said.append(str(error_of(RuntimeError, loss.backward)))
        out, _ = runner.forward(runner.inputs(22)[0], 22)
    said.append(str(error_of(ClosedError, out.float().sum().backward)))
    return said


def test_backwards_that_cannot_be(ranks: Ranks) -> None:
    for twice, closed in ranks.run(2, backwards_that_cannot_be, deadline_s=120.0):
        assert "only one backward per forward" in twice
        assert "closed" in closed
