"""What the long form counts must be able to fail; that it runs is shown by running it."""

from typing import Any

import pytest

from workers.bench.faults import promises_kept

SOUND: dict[str, Any] = {
    "expected": 5,
    "lost": 0,
    "duplicated": 0,
    "unexpected": 0,
    "wrong_role": 0,
    "max_abs_difference": 1e-7,
    "same_champions_everywhere": True,
    "delivery": "exactly_once",
}


def test_a_sound_run_keeps_the_promises_of_its_delivery_mode() -> None:
    assert promises_kept(SOUND)
    assert promises_kept(SOUND | {"delivery": "at_least_once", "duplicated": 3})


@pytest.mark.parametrize(
    "harm",
    [
        {"expected": 0},
        {"lost": 1},
        {"duplicated": 1},
        {"unexpected": 1},
        {"wrong_role": 1},
        {"max_abs_difference": 1e-4},
        {"max_abs_difference": float("nan")},
        {"same_champions_everywhere": False},
    ],
    ids=str,
)
def test_every_harm_breaks_a_promise(harm: dict[str, Any]) -> None:
    assert not promises_kept(SOUND | harm)
