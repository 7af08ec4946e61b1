"""How lines of the CUDA benchmarks come into README.md and benchmarks/results, from made-up lines."""

from __future__ import annotations

import pathlib

import pytest

from benchmarks import cuda_dispatch_combine, cuda_layer, cuda_low_latency, cuda_summary, records, table

FACTS = {"run": "2026-01-02T03:04:05", "git_sha": "abc", "git_dirty": False, "gpu": "a GPU", "gpus": 2, "cores": 4}
DISPATCH = {"num_tokens": 4096, "hidden": 7168, "num_topk": 8, "num_experts": 256}
DISPATCH |= {"num_ranks": 2, "dtype": "bfloat16", "routing": "uniform"}
LOW_LATENCY = {"num_ranks": 2, "num_tokens": 128, "hidden": 7168, "num_topk": 8, "num_experts": 288}
LAYER = {"num_ranks": 2, "num_tokens": 4096, **cuda_layer.SHAPES[0]}
IN_HEAP = "dispatch bfloat16, token-major, cached, in heap"
BY_ROUTE = "dispatch bfloat16, expert-major 1, fresh, in heap"
FLOAT8 = "dispatch fp8 given, token-major, cached, in heap"


def dispatch_record(variant: str, num_sms: int | None, queued_us: float) -> records.Record:
    others = dict.fromkeys(("median_us", "p10_us", "p90_us", "host_median_us", "deepep_gb_s"), 1000.0)
    times = {"queued_median_us": queued_us, "floor_us": 100.0, "remote_bytes": 10**6}
    return {**FACTS, "config": DISPATCH, "variant": variant, "num_sms": num_sms, **others, **times}


def dispatch_records() -> list[records.Record]:
    return [
        dispatch_record(IN_HEAP, 8, 400.0),
        dispatch_record(BY_ROUTE, 8, 1250.0),
        dispatch_record(FLOAT8, 8, 300.0),
        dispatch_record("a variant that README.md does not show", 8, 1.0),
        dispatch_record(IN_HEAP, 24, 200.0),
        dispatch_record(FLOAT8, 24, 125.0),
        dispatch_record(cuda_summary.ALL_GATHER, None, 250.0),
        dispatch_record(cuda_summary.ALL_TO_ALL, None, 1500.0),
    ]


def low_latency_records(num_tokens: int = 128) -> list[records.Record]:
    facts = {**FACTS, "config": LOW_LATENCY | {"num_tokens": num_tokens}, "heap_bytes": 117_600_000}
    spread = {"p10_us": 1.0, "p90_us": 99.0}
    return [
        {
            **facts,
            "variant": name,
            "num_sms": num_sms,
            "median_us": 20.0 + num_sms,
            "single_p50_us": 30.0 + num_sms,
            "single_p99_us": 40.0 + num_sms,
            "send_us": send,
            **spread,
        }
        for num_sms, name, send in ((24, "dispatch fp8", 11.5), (64, "dispatch fp8", 10.5), (64, "both", None))
    ]


def layer_records() -> list[records.Record]:
    times = {
        f"{part}_{of}_us": 9000.0 for part in ("forward", "both") for of in ("median", "p10", "p90", "host_median")
    }
    stock = {**FACTS, "config": LAYER, "variant": "stock", **times, "memory_bytes": 10**6, "relative_error": 0.0}
    return [stock, stock | {"variant": "exact, grouped", "forward_median_us": 6000.0}]


def cells(text: str) -> list[list[str]]:
    """Of a Markdown table, without its rule."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return rows[:1] + rows[2:]


def test_chief_dispatches_by_sms_beside_nccl() -> None:
    header, *rows = cells(cuda_summary.summary_table(dispatch_records()))
    assert header[0] == "us, 2 ranks, 4096 × 7168, top-8 of 256"
    assert header[1:] == ["8 SMs", "24 SMs", "floor", "share", "NCCL", "NCCL / ours"]
    assert rows == [
        [IN_HEAP, "400", "200", "100", "50%", "250", "**1.25×**"],
        # Not measured at the SMs that are compared: no ratio.
        [BY_ROUTE, "1,250", "", "100", "8%", "1,500", ""],
        # NCCL does nothing that compares.
        [FLOAT8, "300", "125", "100", "80%", "", ""],
    ]


def test_chief_dispatches_are_variants_of_the_benchmark() -> None:
    names = {line["variant"] for line in records.latest(records.RESULTS / f"{cuda_dispatch_combine.NAME}.jsonl")}
    assert set(cuda_summary.CHIEF) | {name for name in cuda_summary.CHIEF.values() if name} <= names


def test_low_latency_calls_by_sms() -> None:
    header, *rows = cells(cuda_low_latency.summary_table(low_latency_records()))
    assert header[0] == "us a call, 2 ranks, 128 × 7168, top-8 of 288, heap 117.6 MB"
    assert header[1:] == ["24 SMs", "64 SMs", "single replay, p50 / p99", "send"]
    assert rows == [
        ["dispatch fp8", "44.0", "84.0", "94.0 / 104.0", "10.5"],
        ["both", "", "84.0", "94.0 / 104.0", ""],
    ]


def test_a_table_per_case() -> None:
    lines = low_latency_records() + low_latency_records(num_tokens=1)
    assert cuda_low_latency.summary_table(lines).count("us a call") == 2
    full = table.case_by_case(cuda_low_latency.title, cuda_low_latency.table)(lines)
    assert "2 ranks, 128 × 7168, top-8 of 288, heap 117.6 MB, 2 × a GPU:\n\n| call" in full
    assert "2 ranks, 1 × 7168, top-8 of 288, heap 117.6 MB, 2 × a GPU:\n\n| call" in full


def test_title_tells_logical_nodes() -> None:
    line = dispatch_record(IN_HEAP, 8, 1.0)
    assert cuda_dispatch_combine.title([line]).endswith("uniform routing, 2 ranks, 2 × a GPU")
    line["config"] = DISPATCH | {"domain_size": 1}
    assert cuda_dispatch_combine.title([line]).endswith("2 ranks, 1 a logical node, 2 × a GPU")


@pytest.mark.parametrize(
    ("is_headline", "line", "other"),
    (
        (cuda_summary.is_headline, dispatch_records()[0], {"domain_size": 1}),
        (cuda_summary.is_headline, dispatch_records()[0], {"routing": "one_rank"}),
        (cuda_low_latency.is_headline, low_latency_records()[0], {"num_tokens": 1}),
        (cuda_layer.is_headline, layer_records()[0], {"hidden": 4096}),
    ),
)
def test_headlines_are_of_one_case_over_a_wire(is_headline, line: records.Record, other: records.Record) -> None:
    assert is_headline(line)
    assert not is_headline(line | {"config": line["config"] | other})
    assert not is_headline(line | {"config": line["config"] | {"num_ranks": 1}}), "nobody to send to"
    assert not is_headline(line | {"gpus": 1}), "ranks share the GPU"


def test_other_gpus_are_another_case(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "lines.jsonl"
    old = {"config": LAYER, "run": "08:00", "gpu": "a GPU", "gpus": 2}
    shared = old | {"run": "09:00", "gpus": 1}
    records.append(path, [old, shared, old | {"run": "10:00"}])
    assert [(line["run"], line["gpus"]) for line in records.latest(path)] == [("10:00", 2), ("09:00", 1)]


def test_origin_names_gpus(tmp_path: pathlib.Path) -> None:
    path, here = tmp_path / "lines.jsonl", dict(FACTS)
    origin = records.origin([here, here | {"gpu": "an old GPU", "gpus": 1, "git_sha": "def", "git_dirty": True}], path)
    assert origin == (f"From `{path}`, commit `abc`, `def` with local changes, 2026-01-02, 2 × a GPU, 1 × an old GPU.")


def test_gpu_tables_fill_the_readme(tmp_path: pathlib.Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"{table.BEGIN}\n{table.END}\n")
    for name, lines in (
        (cuda_dispatch_combine.NAME, dispatch_records()),
        (cuda_low_latency.NAME, low_latency_records() + low_latency_records(num_tokens=1)),
        (cuda_layer.NAME, layer_records()),
    ):
        records.append(results / f"{name}.jsonl", lines)
    arguments = ["--results", str(results), "--readme", str(readme)]
    assert table.main([*arguments, "--check"]) == 1
    assert table.main(arguments) == 0
    assert table.main([*arguments, "--check"]) == 0
    chief, everything = readme.read_text(), (results / "README.md").read_text()
    assert chief.count("2 × a GPU") == 4 and "1.50×" in chief
    assert "![On GPUs: dispatch and combine](docs/images/cuda_dispatch_combine.png)" in chief
    assert "does not show" not in chief and "a variant that README.md does not show" in everything
    assert "2 ranks, 1 × 7168" not in chief and "2 ranks, 1 × 7168" in everything
    images = list((tmp_path / "docs/images").iterdir())
    assert [image.name for image in images] == ["cuda_dispatch_combine.png"]
    assert images[0].read_bytes().startswith(b"\x89PNG")


def test_texts_of_this_repository_are_those_of_its_results() -> None:
    assert table.main(["--check"]) == 0, "run python -m benchmarks.table"
