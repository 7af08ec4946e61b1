"""``ray-deepep plan``: constants, predictions, memory, the plan step, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest
import torch
from harness import Ranks, error_of, shm_problem
from test_plan_traffic import layer

from ray_deepep import cuda, shm
from ray_deepep.cli import main
from ray_deepep.doctor.operations import OperationCase, OperationTime, fitting_cases, time_operations
from ray_deepep.errors import InvalidArgumentError, InvalidTypeError
from ray_deepep.handle import ExpertMajor, TokenMajor
from ray_deepep.plan_reference import RankRouting, make_plan
from ray_deepep.planning import (
    default_costs,
    expected_traffic,
    fit_costs,
    predict,
    read_costs,
    simulate_plan_steps,
    uniform_routing,
)
from ray_deepep.planning.costs import OperationCosts, copy_us
from ray_deepep.planning.fit import workload_of
from ray_deepep.planning.memory import device_segment_bytes
from ray_deepep.planning.moved import combine_bytes, dispatch_bytes, low_latency_bytes

needs_core = pytest.mark.skipif(bool(shm_problem()), reason=shm_problem() or "the core is here")
ROW = 1024 * 4
LATENCY, COPY, STAGE, PLAN = 250.0, 5e-4, 3e-4, 0.02


def made_up_time(case: OperationCase, num_ranks: int = 2) -> OperationTime:
    """By the model itself: 250 us, 2 bytes per ns, staging at 3.3, 20 ns a route."""
    workload = workload_of(case, num_ranks, "shm", 4)
    us = {}
    for side in ("dispatch", "combine"):
        if case.low_latency:
            moved = low_latency_bytes(workload, side)
        else:
            moved = dispatch_bytes(workload) if side == "dispatch" else combine_bytes(workload)
        us[f"{side}_us"] = LATENCY + COPY * moved.copied + STAGE * moved.staged
    us["dispatch_us"] += PLAN * case.new_routing * num_ranks * case.num_tokens * case.num_topk
    return OperationTime(case=case, **us)


def report(**changes: object) -> dict:
    cases = fitting_cases(transport="shm", num_ranks=2, hidden=1024, num_tokens=2048)
    return {
        "host": "test",
        "transport": "shm",
        "num_ranks": 2,
        "num_cores": 2,
        "row_bytes": ROW,
        "pairs": [{"dispatch_gb_per_s": 4.0, "combine_gb_per_s": 5.0, "dispatch_us": 200.0, "combine_us": 180.0}],
        "operations": [dataclasses.asdict(made_up_time(case)) for case in cases],
    } | changes


def planned(workload, costs) -> dict[str, float]:
    return {plan.operation: plan.us for plan in predict(workload, costs).operations}


# Constants and predictions


@needs_core
@pytest.mark.parametrize(
    "case",
    (
        OperationCase(num_tokens=3000, hidden=2048, num_topk=2, num_experts=8, new_routing=True),
        OperationCase(num_tokens=700, hidden=512, num_topk=6, num_experts=64, rows_in_heap=False),
        OperationCase(num_tokens=2048, hidden=1024, num_topk=3, num_experts=8, layout="expert_major", reduce="exact"),
        OperationCase(num_tokens=2048, hidden=1024, num_topk=3, num_experts=8, layout="expert_major"),
        OperationCase(num_tokens=100, hidden=1024, num_topk=3, num_experts=8, low_latency=True),
    ),
    ids=("new", "staged", "exact", "fast", "low_latency"),
)
def test_constants_of_a_machine_that_obeys_the_model_predict_it(case: OperationCase) -> None:
    costs = fit_costs(report(), source="test")
    name = "low_latency_{}" if case.low_latency else "{}"
    us, truth = planned(workload_of(case, 2, "shm", 4), costs), made_up_time(case)
    # The time of one row stands for the latency, so the row's own time is counted twice: 3 us of it.
    assert us[name.format("dispatch")] == pytest.approx(truth.dispatch_us, rel=0.01, abs=10.0)
    assert us[name.format("combine")] == pytest.approx(truth.combine_us, rel=0.01, abs=10.0)


def test_constants_of_gpus_tell_the_link_from_copies() -> None:
    """Times by the model: 20 us, 300 GB/s over the link, 1,000 GB/s of copies."""
    cases = fitting_cases(transport="cuda", num_ranks=2, hidden=7168, num_tokens=4096)
    times = []
    for case in cases:
        workload = workload_of(case, 2, "cuda", 2)
        moved = {"dispatch": dispatch_bytes(workload), "combine": combine_bytes(workload)}
        us = {f"{side}_us": 20.0 + max(m.link / 300e3, m.copied / 1000e3) for side, m in moved.items()}
        times.append(dataclasses.asdict(OperationTime(case=case, **us)))
    costs = fit_costs(report(transport="cuda", row_bytes=14336, operations=times), source="test")
    assert costs.link_gb_per_s == pytest.approx(300, rel=0.01)
    ((num_bytes, us),) = costs.operations["expert_major_dispatch"].copy_us
    assert us == pytest.approx(num_bytes / 1000e3, rel=0.01)
    assert costs.num_cores is None and "low_latency_dispatch" not in costs.operations
    workload = layer(num_nodes=1, gpus_per_node=2, hidden=4096, num_tokens=8192, rows_in_heap=True, cached_plan=True)
    expected = 20 + dispatch_bytes(workload).link / 300e3
    assert planned(workload, costs)["dispatch"] == pytest.approx(expected, rel=0.01)
    by_expert = dataclasses.replace(workload, layout="expert_major")
    expected = 20 + dispatch_bytes(by_expert).copied / 1000e3
    assert planned(by_expert, costs)["dispatch"] == pytest.approx(expected, rel=0.01)


def test_layouts_have_costs_of_their_own_on_gpus() -> None:
    """Ranks that share a GPU: no link slows token-major rows down, whose bytes cost less than expert-major ones."""
    cases = fitting_cases(transport="cuda", num_ranks=4, hidden=7168, num_tokens=4096)
    rates, times = {"token_major": 2000e3, "expert_major": 800e3}, []

    def combine_us(case: OperationCase) -> float:
        return 20.0 + combine_bytes(workload_of(case, 4, "cuda", 2)).copied / rates[case.layout]

    for case in cases:
        times.append(dataclasses.asdict(OperationTime(case=case, dispatch_us=20.0, combine_us=combine_us(case))))
    costs = fit_costs(report(transport="cuda", num_ranks=4, row_bytes=14336, operations=times), source="test")
    for layout in rates:
        asked = dataclasses.replace(cases[3], num_topk=2, num_tokens=3000, layout=layout)
        us = planned(workload_of(asked, 4, "cuda", 2), costs)["combine"]
        assert us == pytest.approx(combine_us(asked), rel=0.01)


@pytest.mark.parametrize(
    "change",
    (
        {"hidden": 2048, "rows_in_heap": False},
        {"num_tokens": 3000, "num_topk": 6, "new_routing": True},
        {"num_tokens": 2000, "num_topk": 2, "layout": "expert_major", "reduce": "exact"},
    ),
    ids=("narrow", "routes", "exact"),
)
def test_constants_of_gpus_know_rows_and_routes(change: dict[str, object]) -> None:
    """Staging costs 0.01 us a row beside its bytes, a plan 25 us whatever the routes, rows of routes come home fast."""
    cases = fitting_cases(transport="cuda", num_ranks=2, hidden=7168, num_tokens=4096)

    def truth(case: OperationCase) -> OperationTime:
        workload, us = workload_of(case, 2, "cuda", 2), {}
        for side, moved in (("dispatch", dispatch_bytes(workload)), ("combine", combine_bytes(workload))):
            rate = 3000e3 if side == "combine" and workload.sends_routes else 1000e3
            staging = moved.staged / 700e3 + moved.staged_rows * 0.01
            us[f"{side}_us"] = 20.0 + max(moved.link / 900e3, moved.copied / rate) + staging
        if case.new_routing:
            us["dispatch_us"] += 25.0
        return OperationTime(case=case, **us)

    times = [dataclasses.asdict(truth(case)) for case in cases]
    costs = fit_costs(report(transport="cuda", row_bytes=14336, operations=times), source="test")
    asked = dataclasses.replace(cases[3], **change)
    us, expected = planned(workload_of(asked, 2, "cuda", 2), costs), truth(asked)
    # Of a rate over the link nothing shows where copies are slower.
    assert us["dispatch"] == pytest.approx(expected.dispatch_us, rel=0.02)
    assert us["combine"] == pytest.approx(expected.combine_us, rel=0.15)


def test_staging_never_costs_more_than_was_measured() -> None:
    """Measured with 8 ranks on one H200. Rows of half the width were faster than rows in the heap were expected to be,
    which gave staged bytes more than all that staging took."""
    cases = fitting_cases(transport="cuda", num_ranks=8, hidden=7168, num_tokens=4096)
    dispatch_us = (125.8, 139.4, 280.6, 944.3, 1184.5, 1055.5, 1071.2, 1081.4, 554.5)
    combine_us = (113.2, 133.5, 221.2, 591.0, 1365.1, 592.1, 1477.5, 708.4, 881.0)
    measured = zip(cases, dispatch_us, combine_us, strict=True)
    times = [dataclasses.asdict(OperationTime(case=c, dispatch_us=d, combine_us=b)) for c, d, b in measured]
    costs = fit_costs(report(transport="cuda", num_ranks=8, row_bytes=14336, operations=times), source="test")
    in_heap = dataclasses.replace(cases[3], num_topk=2)
    heap, plain = (
        planned(workload_of(dataclasses.replace(in_heap, rows_in_heap=resident), 8, "cuda", 2), costs)["dispatch"]
        for resident in (True, False)
    )
    assert 0.9 < (plain - heap) / (1184.5 - 944.3) <= 1.0


@needs_core
def test_ranks_that_share_cores_are_slower() -> None:
    costs = fit_costs(report(), source="test")
    two = layer(num_nodes=1, gpus_per_node=2, transport="shm", dtype="float32")
    four = dataclasses.replace(two, gpus_per_node=4, num_tokens=0)
    of_two = planned(dataclasses.replace(two, num_tokens=0), costs)["combine"]
    assert planned(four, costs)["combine"] == pytest.approx(2 * of_two)
    assert any("extrapolated to 4" in note for note in predict(four, costs).notes)


def test_default_gpu_constants_are_those_of_the_facts_table() -> None:
    """4,096 x 7,168 bf16, top-8 of 256, 2 GPUs: what a kernel that only moves rows took."""
    workload = layer(
        num_nodes=1, gpus_per_node=2, hidden=7168, num_experts=256, num_topk=8, num_tokens=4096,
        rows_in_heap=True, cached_plan=True,
    )  # fmt: skip
    costs = default_costs("cuda")
    assert planned(workload, costs)["dispatch"] == pytest.approx(179, rel=0.2)
    assert planned(workload, costs)["combine"] == pytest.approx(191, rel=0.2)
    expert_major = dataclasses.replace(workload, layout="expert_major")
    assert planned(expert_major, costs)["dispatch"] == pytest.approx(404, rel=0.2)
    prediction = predict(workload, costs)
    assert "defaults" in prediction.constants
    assert prediction.operations[0].nvlink_bytes == pytest.approx(58.5e6, rel=0.01)


def test_rdma_rows_are_one_per_node() -> None:
    workload = layer(rows_in_heap=True)
    plan = predict(workload, dataclasses.replace(default_costs("cuda"), rdma_gb_per_s=10.0)).operations[0]
    rows = expected_traffic(workload, workload.num_tokens).rdma_rows
    assert plan.rdma_bytes == pytest.approx(rows * 512) and rows < workload.num_tokens
    assert plan.floor_us == pytest.approx(rows * 512 / 10.0 * 1e-3)


def test_copies_cost_what_the_line_through_the_points_says() -> None:
    costs = OperationCosts(latency_us=1.0, copy_us=((100.0, 10.0), (200.0, 40.0)))
    assert [copy_us(costs, n) for n in (0, 50, 100, 150, 200, 300)] == [0, 5, 10, 25, 40, 70]


def test_a_report_without_operations_gives_the_pairs_rates() -> None:
    costs = fit_costs(report(operations=[]), source="old")
    assert "pairs only" in costs.source and set(costs.operations) == {"dispatch", "combine"}
    assert costs.operations["dispatch"].copy_us[0] == (1e9, 1e6 / 4.0)


@needs_core
def test_the_doctor_times_every_case(ranks: Ranks) -> None:
    for times in ranks.run(2, _time_small_cases):
        assert len(times) == 9 and all(us > 0 for us in times)


def _time_small_cases(context) -> list[float]:
    cases = fitting_cases(transport="shm", num_ranks=2, hidden=128, num_tokens=32)
    times = time_operations(context.communicator("shm"), cases, dtype=torch.float32, num_rounds=1)
    return [min(entry.dispatch_us, entry.combine_us) for entry in times]


# Memory


@pytest.mark.skipif(not cuda.core_version()[0], reason=f"no CUDA core: {cuda.core_version()[1]}")
@pytest.mark.parametrize("changes", ({}, {"max_rows": 5000}, {"rows_in_heap": True}, {"hidden": 7168, "num_topk": 8}))
def test_the_documented_segment_formula_is_the_cores(changes: dict) -> None:
    workload = layer(**changes)
    own = device_segment_bytes(workload, workload.max_rows)
    formula = device_segment_bytes(workload, workload.max_rows, use_core=False)
    assert own == pytest.approx(formula, abs=64 * 1024, rel=1e-4)


@needs_core
def test_host_memory_is_reserved_by_the_core_and_used_where_rows_are() -> None:
    workload = layer(num_nodes=1, gpus_per_node=2, transport="shm", dtype="float32", hidden=1024, num_tokens=1000)
    memory = predict(workload, default_costs("shm")).memory
    sizes = shm._load().BufferSizes()
    sizes.num_experts, sizes.hidden, sizes.num_topk, sizes.max_tokens = 64, 1024, 6, 1000
    assert memory.heap_bytes == 4096 + 2 * sizes.area_bytes(2)
    rows = expected_traffic(workload, 1000)
    assert 2 * rows.staged_tokens * ROW < memory.heap_used_bytes < 2.1 * rows.staged_tokens * ROW
    assert memory.host_bytes_per_node == 2 * memory.host_bytes


# The plan step


@needs_core
@pytest.mark.parametrize("layout", ("token_major", "expert_major"))
def test_the_simulated_plan_is_the_references(layout: str) -> None:
    num_ranks, tokens, topk, experts = 4, 50, 3, 8
    (step,) = simulate_plan_steps([num_ranks], num_tokens=tokens, num_topk=topk, num_experts=experts, layout=layout)
    topk_idx = uniform_routing(num_ranks * tokens, topk, experts, seed=num_ranks).long().view(num_ranks, tokens, topk)
    routing = [RankRouting(topk_idx=own, topk_weights=torch.ones(own.shape), locations=None) for own in topk_idx]
    kind = TokenMajor() if layout == "token_major" else ExpertMajor()
    plan = make_plan(routing, rank=2, num_experts=experts, layout=kind, sequence=1)
    assert step.num_recv_tokens == sum(plan.num_recv_rows)
    assert step.read_bytes == num_ranks * (tokens * topk * 4 + (num_ranks + experts) * 8)
    assert step.plan_ms > 0


@needs_core
def test_memory_of_the_plan_is_what_the_core_takes() -> None:
    workload = layer(num_nodes=1, gpus_per_node=8, transport="shm", num_tokens=512)
    (step,) = simulate_plan_steps([8], num_tokens=512, num_topk=6, num_experts=64, layout="token_major")
    # The core's own lists; weights, 4 bytes a route sent and received, are beside them.
    with_weights = step.plan_bytes + 2 * 512 * 6 * 4
    assert predict(workload, default_costs("shm")).memory.plan_bytes == pytest.approx(with_weights, rel=0.1)


# Bad input, and what is printed

SIZES = ["--hidden", "1024", "--experts", "64", "--topk", "4", "--tokens", "512"]
CLUSTER = ["--nodes", "2", "--gpus-per-node", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ("--experts 63", "num_experts: must be a multiple of 8 ranks; got 63"),
        ("--nodes 0", "num_nodes: must be in [1, 2**31); got 0"),
        ("--topk 65", "num_topk: must be at most 32, the experts that a token can name; got 65"),
        ("--tokens -1", "num_tokens: must be in [0, 2**31); got -1"),
        ("--low-latency-tokens 2000", "low_latency_tokens: must be at most 1024; got 2000"),
        ("--dtype int8", "dtype: must be one of float32, bfloat16, float16, float8; got 'int8'"),
        ("--dtype float8 --hidden 100", "hidden: must be a multiple of 128 with float8 rows; got 100"),
        ("--transport shm", "num_nodes: must be 1: transport shm serves one host; got 2"),
        ("--reduce exact", "reduce: must be fast where rows cross between nodes; got 'exact'"),
        ("--max-rows 0", "max_rows: must be an int >= 1; got 0"),
        ("--rdma-gb-per-s 0", "rdma_gb_per_s: must be > 0 and finite; got 0.0"),
        ("--simulate 4096", "simulate: must be in [1, 2048] ranks; got 4096"),
    ),
)  # fmt: skip
def test_bad_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *CLUSTER, *SIZES, *arguments.split()]) == 2
    assert capsys.readouterr().err == f"ray-deepep plan: {message}\n"


@pytest.mark.parametrize(
    ("text", "rule"),
    (
        (None, "must be a file that can be read"),
        ("{", "must be JSON"),
        ("[]", "must come from ray-deepep doctor --bandwidth --json"),
        (json.dumps({"pairs": [], "transport": "shm"}), "must come from ray-deepep doctor --bandwidth --json"),
        (json.dumps(report(operations=[{"case": {}}])), "must hold what ray-deepep doctor --bandwidth --json writes"),
        (json.dumps(report(operations=[])), "must be measured over transport cuda, not shm"),
    ),
    ids=("missing", "not JSON", "a list", "no pairs", "bad operation", "other transport"),
)
def test_bad_constants(text: str | None, rule: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "doctor.json"
    if text is not None:
        path.write_text(text)
    error = error_of(InvalidArgumentError, lambda: read_costs(path, "cuda"))
    assert (error.argument, error.value) == ("constants", str(path)) and error.rule.startswith(rule)


def test_a_size_that_is_no_number() -> None:
    error = error_of(InvalidTypeError, lambda: layer(hidden=7.5))
    assert (error.argument, error.value) == ("hidden", 7.5)


@needs_core
def test_what_is_printed(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    constants = tmp_path / "doctor.json"
    constants.write_text(json.dumps(report()))
    arguments = ["plan", "--nodes", "1", "--gpus-per-node", "2", *SIZES, "--transport", "shm", "--dtype", "float32"]
    assert main([*arguments, "--constants", str(constants), "--simulate"]) == 0
    text = capsys.readouterr().out
    assert f"constants: {constants}, measured on test" in text and "low_latency_combine" in text
    assert "plan step of one rank" in text
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["constants"].startswith("defaults") and answer["operations"][0]["us"] > 0
    assert answer["plan_steps"] == [] and answer["memory"]["heap_bytes"] > 0
