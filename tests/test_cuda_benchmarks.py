"""What the CUDA benchmarks count and show, checked without a GPU. Times are not judged."""

from __future__ import annotations

import json
import pathlib

import device_cases
import pytest
import torch
from cases import Case as DispatchCase

from benchmarks import cuda_dispatch_combine, cuda_layer, cuda_overlap, cuda_timing, cuda_traffic, nccl_baselines
from ray_deepep import ExpertMajor, TokenMajor

NUM_RANKS, NUM_TOKENS, NUM_EXPERTS, NUM_TOPK = 4, 50, 16, 3


def traffic_and_world(alignment: int | None) -> tuple[cuda_traffic.Traffic, device_cases.World]:
    """The benchmark's counts, and the oracle's for the same routing."""
    layout = TokenMajor() if alignment is None else ExpertMajor(alignment)
    sizes = {"num_experts": NUM_EXPERTS, "num_topk": NUM_TOPK, "hidden": 8}
    dispatch = DispatchCase(seed=5, num_tokens=(NUM_TOKENS,) * NUM_RANKS, layout=layout, routing="distinct", **sizes)
    world = device_cases.make_world(dispatch, torch.device("cpu"))
    case = cuda_traffic.Case(num_ranks=NUM_RANKS, num_tokens=NUM_TOKENS, dtype="bfloat16", routing="uniform", **sizes)
    owners = [idx // world.num_local_experts for idx in world.topk_idx]
    pairs = [[len({t for t, k in (owner == d).nonzero().tolist()}) for d in range(NUM_RANKS)] for owner in owners]
    routes = [[int((owner == d).sum()) for d in range(NUM_RANKS)] for owner in owners]
    experts = torch.bincount(torch.cat(world.topk_idx).flatten(), minlength=NUM_EXPERTS)
    found = cuda_traffic.Traffic(
        case=case, pairs=torch.tensor(pairs), routes=torch.tensor(routes), expert_routes=experts
    )
    return found, world


@pytest.mark.parametrize("alignment", (None, 1, 16))
def test_rows_and_bytes_of_a_dispatch(alignment: int | None) -> None:
    traffic, world = traffic_and_world(alignment)
    num_rows = [here.num_rows for here in world.arrivals]
    assert traffic.num_rows(alignment) == num_rows
    source = torch.arange(NUM_RANKS).repeat_interleave(NUM_TOKENS)
    received = [source[here.tokens] for here in world.arrivals]
    come_in = [int((sources != rank).sum()) for rank, sources in enumerate(received)]
    go_out = [sum(int((s == rank).sum()) for d, s in enumerate(received) if d != rank) for rank in range(NUM_RANKS)]
    moved = traffic.dispatch(100, alignment)
    assert moved.remote == 100 * max(come_in + go_out)
    own = [int((sources == rank).sum()) for rank, sources in enumerate(received)]
    assert moved.local == 100 * max(a + b for a, b in zip(own, num_rows))
    assert moved.received == 100 * max(len(sources) for sources in received)


def test_bytes_of_combines() -> None:
    traffic, _ = traffic_and_world(1)
    token_major, fast, exact = (traffic.combine(10, reduce) for reduce in (None, "fast", "exact"))
    assert token_major.remote == fast.remote == traffic.dispatch(10, 1).remote < exact.remote
    assert token_major.local < exact.local < fast.local
    record = exact.record(median_us=exact.remote / cuda_traffic.WIRE_GB_S / 1e3 * 4)
    assert record["share_of_floor"] == pytest.approx(0.25, abs=1e-3)


def test_nccl_is_left_out_with_a_reason() -> None:
    assert "nobody" in nccl_baselines.nccl_problem(1)
    most = torch.cuda.device_count()
    assert f"{most + 2} ranks share {most}" in nccl_baselines.nccl_problem(most + 2)


def test_table_of_times() -> None:
    times = cuda_timing.Quantiles.of([200.0, 210.0, 220.0, 230.0, 240.0])
    assert (times.median, times.p10, times.p90) == (220.0, 204.0, 236.0)
    timing = cuda_timing.Timing(idle=times, queued=times, host=times, idle_medians=[220.0, 219.0])
    traffic, _ = traffic_and_world(None)
    moved = traffic.dispatch(14_336, None).record(220.0)
    record = {"variant": "dispatch", "num_sms": 24, **timing.record(), **moved, "kernels_us": {"pull": 180.0}}
    assert "| dispatch |  24 | 220.0 |" in cuda_dispatch_combine.table([record])
    assert "180.0" in cuda_dispatch_combine.kernels_table([record])
    baseline = record | {"variant": "NCCL all_gather of all tokens", "num_sms": None}
    assert cuda_dispatch_combine.table([record, baseline]).count("\n") == 3


def test_table_of_layers() -> None:
    times = {"median_us": 8000.0, "p10_us": 7900.0, "p90_us": 8200.0}
    stock = {f"{part}_{name}": us for part in ("forward", "both") for name, us in times.items()}
    stock |= {"variant": "stock", "memory_bytes": 3_000_000_000, "relative_error": 0.0, "both_host_median_us": 1000.0}
    ours = {
        **stock,
        "variant": "exact, grouped",
        "both_median_us": 2000.0,
        "relative_error": 0.0021,
        "heap_bytes": 540_000_000,
    }
    lines = cuda_layer.table([stock, ours]).splitlines()
    assert (
        "4.00×" in lines[-1]
        and "50%" in lines[-1]
        and "0.0021" in lines[-1]
        and " 3,000 |" in lines[-2]
        and "3,000 + 540" in lines[-1]
    )


def test_layer_shapes_can_be_shared_by_two_ranks() -> None:
    for shape in cuda_layer.SHAPES:
        case = cuda_layer.Case(num_ranks=2, **shape)
        assert case.num_experts % 2 == 0 and case.hidden % 8 == 0 and case.inner % 8 == 0


def overlap_record(operation: str, num_sms: int) -> dict[str, object]:
    times = {"operation_alone_us": 300.0, "product_alone_us": 700.0, "together_us": 760.0 + num_sms}
    done = {"operation_together_us": 400.0, "product_together_us": 750.0, "hidden": 0.8}
    config = {"num_ranks": 2, "num_tokens": 64, "hidden": 256, "num_topk": 4, "num_experts": 16}
    config["product"] = [8192, 7168, 4096]
    facts = {"run": "2026-01-01", "gpu": "a GPU", "config": config}
    return {**facts, "operation": operation, "num_sms": num_sms, **times, **done}


def test_overlap_is_drawn_from_lines(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [overlap_record(operation, num_sms) for operation in ("dispatch", "combine") for num_sms in (8, 24)]
    assert "| dispatch  |  24 |" in cuda_overlap.table(records)
    lines, image = tmp_path / "lines.jsonl", tmp_path / "plot.png"
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    cuda_overlap.main(["--draw", "--out", str(lines), "--image", str(image)])
    assert image.read_bytes().startswith(b"\x89PNG") and str(image) in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no results"):
        cuda_overlap.main(["--draw", "--out", str(tmp_path / "none.jsonl"), "--image", str(image)])
