"""The command line: what is wrong with it is one line and exit code 2, before anything is started."""

from __future__ import annotations

import pytest

from ray_deepep.cli import main

BAD = (
    (["run", "no_such_script.py"], "ray-deepep run: script: must be an existing file; got 'no_such_script.py'"),
    (["doctor", "--ranks", "3"], "ray-deepep doctor: --ranks: goes with --bandwidth only; got 3"),
    (["doctor", "--deadline", "5"], "ray-deepep doctor: --deadline: goes with --bandwidth or --cluster only; got 5.0"),
    (["doctor", "--bandwidth", "--ranks", "1"], "ray-deepep doctor: num_ranks: must be >= 2; got 1"),
    (["doctor", "--bandwidth", "--deadline", "0"], "ray-deepep doctor: deadline_s: must be > 0; got 0.0"),
)


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"{message}\n"


def test_bad_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_DEEPEP", "yes")
    assert main(["run", __file__]) == 2
    assert capsys.readouterr().err == "ray-deepep run: RAY_DEEPEP: must be 0 or 1; got 'yes'\n"
