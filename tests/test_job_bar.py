"""The bar of a job that another process runs, from the lines of its log."""

import io
import time

import pytest

from train import job_bar
from train.job_bar import JobBar, stage_of


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """From here on; pytest itself changes stderr between a fixture and its test."""
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    return screen


@pytest.mark.parametrize(
    ("line", "stage"),
    (
        ("Running entrypoint for job raysubmit_1: python -m train.ray_main", "the job's Python starts"),
        (
            "\x1b[36m(TrainController pid=7)\x1b[0m Attempting to start training worker group of size 2",
            "starting workers",
        ),
        ("Requesting resources: {'CPU': 1.0} * 2", "Ray Train starts"),
        ("Started training worker group of size 2:", "workers are there"),
        ("(RayTrainWorker pid=123, ip=192.0.2.1) attempt 1 begins", "building the model"),
        ("step 1/8 loss 5.5879 tokens/s 6504", ""),
        ("Setting up process group", ""),
        ("", ""),
    ),
)
def test_stages(line: str, stage: str) -> None:
    assert stage_of(line) == stage


def test_a_bar_says_what_the_job_does_then_its_steps(monkeypatch, capsys) -> None:
    screen = on_terminal(monkeypatch)
    with JobBar("ray_deepep", num_steps=8) as bar:
        bar.show("Running entrypoint for job raysubmit_1: python")
        assert "0/8" in screen.getvalue() and "the job's Python starts" in screen.getvalue()
        bar.show("waiting: the job has not started after 30 s")
        bar.show("step 1/8 loss 5.5879 tokens/s 6504")
        bar.show("attempt 2 begins")
        bar.show("RAY_DEEPEP_FAULT {}")
        bar.show("step 8/8 loss 4.9101 tokens/s 10936")
    text = screen.getvalue()
    assert capsys.readouterr().out == "waiting: the job has not started after 30 s\nRAY_DEEPEP_FAULT {}\n"
    assert "1/8" in text and "8/8" in text and "loss 4.9101 tokens/s 10936" in text
    assert "building the model" not in text, "steps say more than the start of another attempt"


def test_its_clock_ticks_until_the_first_step(monkeypatch) -> None:
    screen = on_terminal(monkeypatch)
    monkeypatch.setattr(job_bar, "_TICK_S", 0.02)
    with JobBar("stock", num_steps=8) as bar:
        before = len(screen.getvalue())
        end = time.monotonic() + 5.0
        while len(screen.getvalue()) == before and time.monotonic() < end:
            time.sleep(0.01)
        assert len(screen.getvalue()) > before
        bar.show("step 1/8 loss 5.5879")
        bar._ticker.join(5.0)
        assert not bar._ticker.is_alive()


def test_a_log_file_gets_no_ticks(monkeypatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    with JobBar("stock", num_steps=8) as bar:
        assert not bar._ticker.is_alive()
    assert "0/8" in out.getvalue()
