"""``ray-deepep doctor`` on this machine: the test between pairs, commands, probes, and what is printed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from doctor_cases import FOLDER, gpu_readings, machine, software_readings
from harness import shm_problem

from ray_deepep import InvalidArgumentError, cli
from ray_deepep.doctor import PairTest, diagnose, finding_lines, judge_pairs, measure_pairs, worst
from ray_deepep.doctor import bandwidth as bandwidth_module
from ray_deepep.doctor.commands import run
from ray_deepep.doctor.findings import Finding, Status
from ray_deepep.doctor.pairs import PairOutcome, PairSpeed
from ray_deepep.doctor.probes import read_gpus, read_machine
from ray_deepep.doctor.readings import Output

# The test between pairs


def speeds(*slow: tuple[int, int]) -> PairOutcome:
    pairs = tuple(
        PairSpeed(
            source=i,
            target=j,
            dispatch_gb_per_s=100.0 if (i, j) in slow else 360.0,
            combine_gb_per_s=350.0,
            dispatch_us=12.0,
            combine_us=11.0,
        )
        for i in range(4)
        for j in range(4)
        if i != j
    )
    return PairOutcome(transport="cuda", num_ranks=4, row_bytes=14336, num_rows=4096, pairs=pairs)


def test_equal_pairs_are_fine_and_slow_ones_are_named():
    assert judge_pairs(speeds()).status is Status.OK
    found = judge_pairs(speeds((2, 3), (3, 1)))
    assert found.status is Status.WARNING
    assert found.value.endswith("below 60% of the median: 2->3, 3->1")
    on_cpus = dataclasses.replace(speeds((2, 3)), transport="shm")
    assert judge_pairs(on_cpus).status is Status.OK, "there it only says that the machine is busy"


@pytest.mark.skipif(bool(shm_problem()), reason=shm_problem())
def test_rows_go_between_all_pairs_of_three_ranks():
    outcome = measure_pairs(PairTest(num_ranks=3, deadline_s=100.0), num_gpus=0)
    assert outcome.problem == ""
    assert [(pair.source, pair.target) for pair in outcome.pairs] == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert all(min(pair.dispatch_gb_per_s, pair.combine_gb_per_s) > 0 for pair in outcome.pairs)
    assert all(min(pair.dispatch_us, pair.combine_us) > 0 for pair in outcome.pairs)
    # The constants of `ray-deepep plan` come with the pairs wherever the core is built.
    assert bool(outcome.operations) == (outcome.transport == "shm")
    assert all(min(entry.dispatch_us, entry.combine_us) > 0 for entry in outcome.operations)


def test_the_deadline_ends_the_test_and_names_who_is_late():
    begin = time.monotonic()
    outcome = measure_pairs(PairTest(num_ranks=2, deadline_s=0.3), num_gpus=0)
    assert time.monotonic() - begin < 20.0
    assert outcome.problem == "ranks 0, 1 did not end within 0.3 s"
    assert judge_pairs(outcome).status is Status.PROBLEM


def fail(*args: object) -> None:
    os._exit(7)


def test_a_rank_that_dies_is_named(monkeypatch):
    monkeypatch.setattr(bandwidth_module, "_rank_main", fail)
    outcome = measure_pairs(PairTest(num_ranks=2, deadline_s=60.0), num_gpus=0)
    assert outcome.problem.endswith("failed: exit code 7")


def test_bad_settings_of_the_test_are_refused():
    with pytest.raises(InvalidArgumentError, match="num_ranks"):
        PairTest(num_ranks=1)
    with pytest.raises(InvalidArgumentError, match="deadline_s"):
        PairTest(deadline_s=0.0)


# Commands and this machine


def test_a_command_that_hangs_or_fails_is_an_output_not_an_error():
    begin = time.monotonic()
    assert "did not answer within 0.2 s" in run("sleep", "30", timeout_s=0.2).problem
    assert time.monotonic() - begin < 5.0
    assert run("no-such-command-here").problem == "no-such-command-here not found"
    assert run(sys.executable, "-c", "print('first'); print('why'); exit(3)").problem == "why"
    assert run(sys.executable, "-c", "print('text')").text == "text\n"


def test_the_probes_of_this_machine_agree_with_it():
    readings = read_machine()
    assert readings.system.num_cpus == len(os.sched_getaffinity(0))
    assert "torch" in readings.software.packages
    assert any(line.startswith("torch>=") or line.startswith("torch<") for line in readings.software.requirements)
    assert worst(diagnose(readings)) is not Status.PROBLEM or readings.gpu.has_nvidia_smi or shm_problem()


OLD_DRIVER = """\
#!/bin/sh
case "$*" in
*clocks_event_reasons*) echo "Field \\"clocks_event_reasons.active\\" is not a valid field to query."; exit 2 ;;
*clocks_throttle_reasons*) cat {folder}/clocks.csv ;;
*ecc.errors*) cat {folder}/ecc.csv ;;
*remapped-rows*) cat {folder}/remapped_rows.csv ;;
*--query-gpu=*) cat {folder}/gpus.csv ;;
nvlink*) cat {folder}/nvlink.txt ;;
topo*) echo "no such command"; exit 3 ;;
esac
"""


def test_an_old_driver_is_asked_in_its_own_words(monkeypatch, tmp_path):
    stand_in = tmp_path / "nvidia-smi"
    stand_in.write_text(OLD_DRIVER.format(folder=FOLDER / "h100x8"))
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    readings = read_gpus()
    known = gpu_readings("h100x8")
    for reading in ("gpus", "clocks", "ecc", "remapped_rows", "nvlink"):
        assert getattr(readings, reading) == getattr(known, reading), reading
    assert readings.peer_access == Output(problem="no such command")
    assert json.loads(readings.torch.text)["num_gpus"] == torch.cuda.device_count()


def test_lines_are_coloured_only_if_asked_and_wrapped_only_in_a_terminal():
    findings = [Finding(name="a", status=Status.PROBLEM, value="long " * 30, advice="mend it")]
    plain = finding_lines(findings)
    assert plain[0].startswith("problem  a  long") and "\033" not in "".join(plain)
    assert plain[1].split() == ["->", "mend", "it"]
    coloured = finding_lines(findings, coloured=True, columns=80)
    assert coloured[0].startswith("\033[31mproblem\033[0m")
    assert len(coloured) > 2 and all(len(line) <= 80 + len("\033[31m\033[0m") for line in coloured)


def test_json_for_programs_and_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr("ray_deepep.doctor.report.read_machine", machine)
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["host"] == "node-a"
    assert {"name": "driver", "status": "ok", "value": "580.159.04", "advice": ""} in report["findings"]
    sick = machine(software=software_readings(cpu_core=Output(problem="gone")))
    monkeypatch.setattr("ray_deepep.doctor.report.read_machine", lambda: sick)
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "problem  CPU core" in text
    assert text.endswith("\n\n1 problem, 0 warnings\n")


def test_the_command_on_this_machine():
    command = [sys.executable, "-m", "ray_deepep.cli", "doctor", "--ranks", "1", "--bandwidth"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "num_ranks" in done.stderr
