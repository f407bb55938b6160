import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.splits import Fold, Span, time_split, walk_forward

TS = np.arange(1000, dtype=np.int64) * 60_000


def test_time_split_gives_each_span_its_share_of_the_bars_in_order() -> None:
    fold = time_split(TS, (0.6, 0.2, 0.2))
    assert [int(s.rows(TS).sum()) for s in (fold.train, fold.validation, fold.test)] == [
        600,
        200,
        200,
    ]
    assert fold.train.to_ts <= fold.validation.from_ts < fold.validation.to_ts <= fold.test.from_ts


def test_a_fraction_of_zero_gives_an_empty_span() -> None:
    fold = time_split(TS, (0.8, 0.2, 0.0))
    assert not fold.test.rows(TS).any()
    assert fold.validation.rows(TS)[-1]


def test_shares_are_of_pooled_bars_whatever_their_order() -> None:
    pooled = np.random.default_rng(0).permutation(np.concatenate([TS, TS[500:]]))
    fold = time_split(pooled, (0.5, 0.25, 0.25))
    assert abs(int(fold.train.rows(pooled).sum()) - 750) <= 2


def test_a_row_whose_label_is_known_after_the_cut_is_purged() -> None:
    fold = time_split(TS)
    known = TS + 12 * 60_000
    rows = fold.train.purged_rows(TS, known)
    assert known[rows].max() < fold.train.to_ts
    assert rows.sum() == 600 - 12


def test_an_embargo_keeps_its_distance_before_validation_and_test() -> None:
    fold = time_split(TS, embargo_ms=30 * 60_000)
    assert fold.validation.from_ts - TS[fold.train.rows(TS)].max() > 30 * 60_000
    assert fold.test.from_ts - TS[fold.validation.rows(TS)].max() > 30 * 60_000


@settings(deadline=None)
@given(
    folds=st.integers(1, 9),
    first_test=st.floats(0.1, 0.9),
    validation=st.floats(0, 0.5),
    rolling=st.booleans(),
    embargo=st.integers(0, 50),
)
def test_walk_forward_tests_each_late_bar_once_and_never_looks_ahead(
    folds: int, first_test: float, validation: float, rolling: bool, embargo: int
) -> None:
    made = walk_forward(
        TS, folds, first_test, validation, "rolling" if rolling else "expanding", embargo * 60_000
    )
    assert len(made) == folds
    tested = np.sum([fold.test.rows(TS) for fold in made], axis=0)
    late = made[0].test.from_ts <= TS
    assert set(tested[late]) == {1}
    assert not tested[~late].any()
    for fold in made:
        assert fold.train.to_ts <= fold.validation.from_ts
        assert fold.validation.to_ts <= fold.test.from_ts


def lengths(folds: list[Fold]) -> list[int]:
    return [fold.test.from_ts - fold.train.from_ts for fold in folds]


def test_an_expanding_history_grows_and_a_rolling_one_keeps_its_length() -> None:
    expanding = lengths(walk_forward(TS, 4, kind="expanding"))
    rolling = lengths(walk_forward(TS, 4, kind="rolling"))
    assert expanding == sorted(set(expanding))
    assert max(rolling) - min(rolling) <= 60_000


@pytest.mark.parametrize("fractions", [(0.5, 0.2, 0.2), (1.2, -0.1, -0.1)])
def test_fractions_that_are_no_partition_are_refused(
    fractions: tuple[float, float, float],
) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        time_split(TS, fractions)


def test_nothing_to_split_and_no_folds_are_refused() -> None:
    with pytest.raises(ValueError, match="no bars"):
        time_split(TS[:0])
    with pytest.raises(ValueError, match="folds"):
        walk_forward(TS, 0)


def test_a_span_holds_its_start_and_not_its_end() -> None:
    assert Span(60_000, 180_000).rows(TS[:5]).tolist() == [False, True, True, False, False]
