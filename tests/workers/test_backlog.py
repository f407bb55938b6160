"""What waits is given out so that a batch has each key once, and each partition's messages in their order."""

from collections import Counter
from typing import NamedTuple, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.kafka import Backlog, Message


class Waiting(NamedTuple):
    at: int
    number: int

    keys: int

    def partition(self) -> int:
        return self.at

    def key(self) -> bytes:
        return b"%d" % (self.number % self.keys)


def waiting(counts: dict[int, int], keys: int = 10) -> list[Message]:
    """So many messages of each partition, one partition after the other, keys in turn."""
    return [cast(Message, Waiting(p, i, keys)) for p, count in counts.items() for i in range(count)]


def holding(counts: dict[int, int], keys: int = 10) -> Backlog:
    backlog = Backlog()
    backlog.add(waiting(counts, keys))
    return backlog


def shares(messages: list[Message]) -> dict[int, int]:
    return dict(Counter(message.partition() for message in messages))


@pytest.mark.parametrize(
    ("counts", "most", "taken"),
    [
        ({0: 900, 1: 900, 2: 900}, 300, {0: 100, 1: 100, 2: 100}),
        ({0: 900, 1: 20, 2: 900}, 300, {0: 140, 1: 20, 2: 140}),
        ({0: 900}, 300, {0: 300}),
        ({0: 1, 1: 2}, 300, {0: 1, 1: 2}),
        ({0: 5, 1: 5}, 1, {0: 1}),
        ({}, 300, {}),
    ],
    ids=["alike", "one has little", "one partition", "less than a batch", "one only", "nothing"],
)
def test_partitions_share_a_batch_and_what_one_has_not_the_others_get(
    counts: dict[int, int], most: int, taken: dict[int, int]
) -> None:
    assert shares(holding(counts).take(most)) == taken


def test_where_no_key_comes_twice_one_partition_comes_after_the_other_and_each_has_its_turn() -> (
    None
):
    backlog = holding({0: 500, 1: 500, 2: 500}, keys=500)
    taken = [shares(backlog.take(400)) for _ in range(4)]
    assert taken == [{0: 400}, {1: 400}, {2: 400}, {0: 100, 1: 100, 2: 100}]


def test_what_is_given_back_comes_first_again() -> None:
    backlog = holding({0: 10, 1: 10})
    taken = backlog.take(8)
    backlog.give_back(taken[3:])

    assert len(backlog) == 17
    assert sorted(taken[:3] + backlog.take(17)) == waiting({0: 10, 1: 10})  # type: ignore[type-var]


def test_a_cleared_backlog_holds_nothing() -> None:
    backlog = holding({0: 10})
    backlog.clear()

    assert not backlog
    assert backlog.take(10) == []


@given(
    counts=st.dictionaries(st.integers(0, 5), st.integers(0, 30)),
    keys=st.sampled_from([1, 10, 30]),
    steps=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=20),
)
def test_nothing_is_lost_or_doubled_and_each_partition_keeps_its_order(
    counts: dict[int, int], keys: int, steps: list[tuple[int, int]]
) -> None:
    backlog = holding(counts, keys)
    processed: list[Message] = []
    for most, kept in steps:
        taken = backlog.take(most)
        assert len(taken) <= most
        processed += taken[:kept]
        backlog.give_back(taken[kept:])
    processed += backlog.take(len(backlog))

    assert not backlog
    for partition, count in counts.items():
        mine = [m for m in processed if m.partition() == partition]
        assert mine == waiting({partition: count}, keys)
