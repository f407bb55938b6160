"""Only a partition that was looked at, and stood at its end all the while, is idle."""

from workers.idleness import Idleness


def test_a_partition_is_idle_after_standing_at_its_end_long_enough() -> None:
    idleness = Idleness(10.0)
    assert idleness.update([0, 1], 0.0) == set()
    for second in range(1, 10):
        assert idleness.update([0, 1], second) == set()
    assert idleness.update([0], 10.0) == {0}


def test_what_has_moved_begins_anew() -> None:
    idleness = Idleness(10.0)
    for second in range(9):
        idleness.update([0, 1], second)
    idleness.update([1], 9.0)
    assert idleness.update([0, 1], 10.0) == {1}


def test_a_process_that_did_not_look_calls_nobody_idle() -> None:
    idleness = Idleness(10.0)
    for second in (*range(12), 30):
        idle = idleness.update([0], float(second))
    assert idle == set()
    for second in range(31, 41):
        idle = idleness.update([0], float(second))
    assert idle == {0}
