"""`train.sweep`: trials, rows, tables and pictures, without Ray; and what it refuses before anything starts."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from pathlib import Path

import pytest

from train import sweep
from train.errors import ConfigError
from train.presets import TINY
from train.sweep_plots import plot_curves, plot_scaling, plot_sweep
from train.sweep_results import (
    DONE,
    FAILED,
    UNFINISHED,
    Row,
    csv_text,
    efficiencies,
    efficiency_lines,
    one_line,
    ranked,
    read_row,
    table_lines,
    write_result,
)
from train.sweep_space import Choice, Trial, make_trials, scaling_trials, trials_from_json, trials_to_json


def trials(*params: str, num_samples: int = 0, seed: int = 1) -> list[Trial]:
    return make_trials([Choice.parse(text) for text in params], num_samples=num_samples, seed=seed, num_workers=2)


def error_of(call) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value


# Trials


def test_a_grid_has_all_combinations_in_order() -> None:
    found = trials("backend=stock,ray_deepep", "topk=1,2", "capacity=1.5")
    assert [trial.values for trial in found] == [
        {"backend": backend, "topk": topk, "capacity": 1.5} for backend in ("stock", "ray_deepep") for topk in (1, 2)
    ]
    assert [trial.name for trial in found] == ["000", "001", "002", "003"]
    config = found[3].config(TINY)
    assert (config.run.backend, config.model.num_topk, config.model.capacity_factor) == ("ray_deepep", 2, 1.5)


def test_workers_and_sms_are_not_fields_of_the_model() -> None:
    (trial,) = trials("workers=4", "sms=16", "lr=0.01")
    assert (trial.num_workers, trial.num_sms, trial.overrides) == (4, 16, {"optim.lr": 0.01})
    assert trials("lr=0.01")[0].num_workers == 2


def test_search_draws_the_same_for_the_same_seed_and_stays_inside() -> None:
    found = trials("lr=1e-4..1e-2", "topk=1..4", "capacity=1.0..2.0", "experts=4,8", num_samples=200)
    assert [t.values for t in found] == [
        t.values for t in trials("lr=1e-4..1e-2", "topk=1..4", "capacity=1.0..2.0", "experts=4,8", num_samples=200)
    ]
    assert found[0].values != trials("lr=1e-4..1e-2", num_samples=1, seed=2)[0].values
    lrs = [trial.values["lr"] for trial in found]
    assert all(1e-4 <= lr <= 1e-2 for lr in lrs)
    # Evenly over the logarithm: half of them below the geometric mean.
    assert 60 < sum(lr < 1e-3 for lr in lrs) < 140
    assert {trial.values["topk"] for trial in found} == {1, 2, 3, 4}
    assert {trial.values["experts"] for trial in found} == {4, 8}


def test_trials_survive_the_file() -> None:
    found = trials("backend=stock", "workers=1,2", "lr=0.01,0.02")
    assert trials_from_json(trials_to_json(found)) == found


def test_a_scaling_study_is_weak_and_strong() -> None:
    base = TINY.replace(**{"optim.micro_batch": 8})
    found = scaling_trials(base, [1, 2, 4], ["weak", "strong"])
    assert [(t.values["mode"], t.num_workers, t.config(base).optim.micro_batch) for t in found] == [
        ("weak", 1, 8), ("weak", 2, 8), ("weak", 4, 8), ("strong", 1, 8), ("strong", 2, 4), ("strong", 4, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("params", "field", "rule"),
    (
        (["width=3"], "--param", "must be one of backend, ep, experts, topk, capacity, lr, sms, workers"),
        (["topk"], "--param", "must be NAME=VALUE,VALUE or NAME=LOW..HIGH"),
        (["topk=1,1"], "--param", "must not name a value twice"),
        (["topk=1.5"], "--param", "must be integers"),
        (["lr=fast"], "--param", "must be numbers"),
        (["lr=0"], "--param", "must be positive and finite"),
        (["lr=nan"], "--param", "must be positive and finite"),
        (["backend=none"], "run.backend", "must be one of stock, ray_deepep"),
        (["backend=a..b"], "--param", "must be a list: a backend has no range"),
        (["lr=1e-2..1e-3"], "--param", "must begin below its end"),
        (["lr=1e-3..1e-2"], "--param", "a range needs --samples N"),
        (["topk=1", "topk=2"], "--param", "must be given once"),
        (["experts=" + ",".join(map(str, range(1, 1001))), "topk=" + ",".join(map(str, range(1, 33)))], "--param",
         "trials are too many: at most 10000"),
    ),
)  # fmt: skip
def test_bad_parameters(params: list[str], field: str, rule: str) -> None:
    error = error_of(lambda: trials(*params))
    assert (error.field, error.rule) == (field, rule)


@pytest.mark.parametrize(
    ("counts", "modes", "field"),
    (([2, 1], ["weak"], "--scaling"), ([0, 1], ["weak"], "--scaling"), ([1, 2], ["both"], "--modes"),
     ([1, 3], ["strong"], "optim.micro_batch")),
)  # fmt: skip
def test_bad_scaling(counts: list[int], modes: list[str], field: str) -> None:
    assert error_of(lambda: scaling_trials(TINY, counts, modes)).field == field


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--param", "width=3"], "--param = 'width': must be one of backend"),
        (["--param", "topk=1", "--metric", "speed"], "--metric = 'speed': must be one of val_loss"),
        (["--param", "topk=1", "--preset", "huge"], "preset = 'huge'"),
        (["--param", "topk=1", "--at-once", "-1"], "--at-once = -1: must be at least 0"),
        (["--param", "topk=1", "--samples", "-1"], "--samples = -1: must be at least 0"),
        (["--param", "topk=1", "--scaling", "1"], "--param = 'topk=1': cannot be combined with --scaling"),
        (["--param", "topk=1", "--retry-failed"], "--retry-failed = True: goes with --resume only"),
        (["--param", "topk=1", "--workers", "0"], "--workers = 0: must be at least 1"),
        ([], "--param = '': must be given, or --scaling, or --resume"),
        (["--resume"], "must hold a sweep to resume"),
        (["--resume", "--param", "topk=1"], "--resume = True: goes on with the trials it has"),
        (["--param", "topk=5,6"], "model.num_topk = 5: must be at most num_experts=4"),
    ),
)
def test_nothing_starts_with_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(["--preset", "tiny", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_older_sweep_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep.Sweep(base=TINY, trials=trials("topk=1"), metric="val_loss").save(tmp_path)
    assert sweep.main(["--preset", "tiny", "--out", str(tmp_path), "--param", "topk=2"]) == 2
    assert "holds a sweep; --resume it, or choose another folder" in capsys.readouterr().err
    assert sweep.Sweep.load(tmp_path).trials == trials("topk=1")
    (tmp_path / sweep.SWEEP_FILE).write_text("{}")
    assert error_of(lambda: sweep.Sweep.load(tmp_path)).field == "--out"


# Rows


def row(index: int, *, status: str = DONE, error: str = "", folder: str = "", **metrics: float) -> Row:
    trial = dataclasses.replace(trials("topk=1,2,3,4")[index])
    return Row(trial=trial, status=status, error=error, metrics=metrics, folder=folder)


ROWS = [
    row(0, val_loss=3.0, tokens_per_s=100.0),
    row(1, status=FAILED, error="ConfigError: model.num_topk, no"),
    row(2, val_loss=2.0, tokens_per_s=50.0),
    row(3, val_loss=math.nan, tokens_per_s=70.0),
]


def test_rows_are_ranked_and_failed_ones_say_why() -> None:
    assert [r.trial.index for r in ranked(ROWS, "val_loss")] == [2, 0, 1, 3]
    assert [r.trial.index for r in ranked(ROWS, "tokens_per_s")] == [0, 3, 2, 1]
    lines = table_lines(ROWS, "val_loss")
    assert lines[0].split()[:3] == ["trial", "topk", "val_loss"] and lines[1].split()[:3] == ["002", "3", "2"]
    assert lines[3].endswith("failed: ConfigError: model.num_topk, no")


def test_csv_has_a_line_per_trial_and_is_read_back() -> None:
    found = list(csv.DictReader(io.StringIO(csv_text(ROWS))))
    assert [entry["status"] for entry in found] == [DONE, FAILED, DONE, DONE]
    assert found[1]["error"] == "ConfigError: model.num_topk, no" and found[1]["val_loss"] == ""
    assert float(found[2]["val_loss"]) == 2.0 and found[2]["topk"] == "3"


def test_a_trials_end_is_read_from_its_folder(tmp_path: Path) -> None:
    (trial,) = trials("topk=1")
    assert read_row(trial, tmp_path).status == UNFINISHED
    write_result(tmp_path, status=FAILED, error="it broke")
    assert (read_row(trial, tmp_path).status, read_row(trial, tmp_path).error) == (FAILED, "it broke")
    write_result(tmp_path, status=DONE, metrics={"val_loss": 1.0})
    assert read_row(trial, tmp_path).metrics == {"val_loss": 1.0}


def test_a_long_error_is_one_short_line() -> None:
    text = one_line(ValueError("a\nb " + 1000 * "x"))
    assert text.startswith("ValueError: a b xxx") and text.endswith("...") and len(text) == 300


def study() -> list[Row]:
    base = TINY.replace(**{"optim.micro_batch": 8})
    speeds = {("weak", 1): 100.0, ("weak", 2): 180.0, ("strong", 1): 100.0, ("strong", 2): 150.0}
    return [
        Row(trial=trial, status=DONE, metrics={"tokens_per_s": speeds[trial.values["mode"], trial.num_workers]})
        for trial in scaling_trials(base, [1, 2], ["weak", "strong"])
    ]


def test_efficiency_is_speed_up_over_growth() -> None:
    found = {(entry.mode, entry.num_workers): entry for entry in efficiencies(study())}
    assert found["weak", 1].efficiency == found["strong", 1].efficiency == 1.0
    assert found["weak", 2].speedup == pytest.approx(1.8) and found["weak", 2].efficiency == pytest.approx(0.9)
    assert found["strong", 2].efficiency == pytest.approx(0.75)
    assert efficiency_lines(list(found.values()))[-1].split() == ["strong", "2", "150", "1.50", "75%"]
    broken = [dataclasses.replace(r, status=FAILED) if r.trial.num_workers == 1 else r for r in study()]
    assert [e.efficiency for e in efficiencies(broken)] == [1.0, 1.0], "the fewest that are done are the base"
    assert efficiencies(ROWS) == []


def test_pictures_are_drawn_where_there_is_something(tmp_path: Path) -> None:
    assert plot_sweep(ROWS, "val_loss", tmp_path / "sweep.png")
    assert plot_scaling(efficiencies(study()), tmp_path / "scaling.png")
    for name in ("sweep.png", "scaling.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert not plot_sweep(ROWS[1:2], "val_loss", tmp_path / "none.png")
    assert not plot_scaling([], tmp_path / "none.png")
    assert not plot_curves(ROWS, "val_loss", tmp_path / "none.png") and not (tmp_path / "none.png").exists()
