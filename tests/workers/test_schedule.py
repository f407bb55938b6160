import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.schedule import KEPT, Schedule

changes = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(0, 50)), max_size=KEPT
)


@given(changes=changes, ts=st.lists(st.integers(0, 60), min_size=1, max_size=20))
def test_a_bar_belongs_to_the_newest_change_not_after_it(changes, ts):  # type: ignore[no-untyped-def]
    schedule = Schedule()
    truth: dict[int, str | None] = {}
    for bundle, from_ts in changes:
        schedule.give("champion", bundle, from_ts)
        truth = {at: b for at, b in truth.items() if at < from_ts} | {from_ts: bundle}

    holders = list(schedule.holders("champion", np.array(ts, np.int64)))

    for row, at in enumerate(ts):
        past = [start for start in truth if start <= at]
        expected = truth[max(past)] if past else None
        assert [bundle for bundle, _, where in holders if where[row]] == (
            [expected] if expected else []
        )


@given(changes=changes)
def test_a_schedule_survives_json_and_fits_commit_metadata(changes):  # type: ignore[no-untyped-def]
    schedule = Schedule()
    for bundle, from_ts in changes:
        schedule.give("champion", bundle and bundle * 64, from_ts)
        schedule.give("challenger", bundle and bundle * 64, from_ts + 2**40)
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert len(schedule.to_json()) < 4096


def test_a_superseded_bundle_is_needed_only_while_older_bars_may_come() -> None:
    schedule = Schedule()
    schedule.give("champion", "a", 0)
    schedule.give("champion", "b", 100)
    assert schedule.bundles(99) == {"a", "b"}
    assert schedule.bundles(100) == {"b"}


def test_a_change_to_the_past_replaces_what_came_after_it() -> None:
    schedule = Schedule()
    schedule.give("champion", "a", 10)
    schedule.give("champion", "b", 20)
    schedule.give("champion", "c", 5)
    assert schedule.says("champion", "c")
    assert schedule.bundles(0) == {"c"}


def test_a_change_never_touches_bars_that_are_past() -> None:
    schedule = Schedule(newest_ts=100)
    assert schedule.change("champion", "a", 50) == 101
    assert schedule.change("challenger", "b", 200) == 200
    assert Schedule.from_json(schedule.to_json()) == schedule
