"""Calls that do not return in time."""

from __future__ import annotations

import threading
import time

import pytest

from ray_deepep.bounded import BoundedCalls, NoReturnError, call_within

WAIT_S = 10.0


def test_values_and_errors_come_back() -> None:
    calls = BoundedCalls("test")
    assert calls(lambda: 7, WAIT_S) == 7
    with pytest.raises(KeyError, match="x"):
        calls(lambda: {}["x"], WAIT_S)
    assert calls(threading.current_thread, WAIT_S) is calls(threading.current_thread, WAIT_S)
    assert call_within(WAIT_S, lambda: 7, if_late=lambda: None) == 7
    with pytest.raises(KeyError, match="x"):
        call_within(WAIT_S, lambda: {}["x"], if_late=lambda: None)


def test_a_call_that_does_not_return_is_left_and_the_next_ones_refused() -> None:
    calls, end = BoundedCalls("test"), threading.Event()
    begin = time.monotonic()
    with pytest.raises(NoReturnError):
        calls(end.wait, 0.1)
    with pytest.raises(NoReturnError):
        calls(lambda: 7, WAIT_S)
    assert time.monotonic() - begin < WAIT_S / 2
    end.set()


def test_what_a_late_call_made_is_undone() -> None:
    end, undone = threading.Event(), threading.Event()
    with pytest.raises(NoReturnError):
        call_within(0.1, end.wait, if_late=undone.set)
    assert not undone.is_set()
    end.set()
    assert undone.wait(WAIT_S)


def test_the_thread_ends_with_its_owner() -> None:
    calls = BoundedCalls("test")
    thread = calls(threading.current_thread, WAIT_S)
    del calls
    thread.join(WAIT_S)
    assert not thread.is_alive()
