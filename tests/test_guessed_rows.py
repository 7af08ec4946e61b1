"""How many rows a dispatch makes room for before it knows how many come."""

import pytest

from ray_deepep import ExpertMajor, Padded, TokenMajor
from ray_deepep.guessed_rows import GuessedRows


def test_the_first_dispatch_of_a_layout_waits() -> None:
    guessed = GuessedRows()
    guessed.learn(TokenMajor(), 100)
    assert guessed.of(ExpertMajor(), 1000) == 0
    assert guessed.of(ExpertMajor(128), 1000) == 0


@pytest.mark.parametrize(("last", "room"), ((0, 128), (100, 128), (127, 256), (4096, 4480), (60_000, 63_872)))
def test_there_is_room_for_a_sixteenth_more(last: int, room: int) -> None:
    guessed = GuessedRows()
    guessed.learn(TokenMajor(), last)
    assert guessed.of(TokenMajor(), 1 << 20) == room
    assert room >= last * 17 // 16


def test_no_more_than_can_come() -> None:
    guessed = GuessedRows()
    guessed.learn(TokenMajor(), 4000)
    assert guessed.of(TokenMajor(), 4096) == 4096


def test_padded_rows_need_no_guess() -> None:
    guessed = GuessedRows()
    assert guessed.of(Padded(8), 640) == 640
    guessed.learn(Padded(8), 640)
    assert guessed.of(Padded(4), 320) == 320
