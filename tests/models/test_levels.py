from dataclasses import replace

import numpy as np
import pytest

from models.features import DAY_MS
from models.levels import PRIOR_PERIODS, led, levels
from models.panel import Panel
from tests.models.test_evaluation import make_panel

HALF_LIFE_DAYS = 3.0


@pytest.fixture(scope="module")
def panel() -> Panel:
    return make_panel()


def with_labels(panel: Panel, after_ts: int, shift: float) -> Panel:
    """Labels that became known after `after_ts` are others."""
    histories = [
        replace(h, y=h.y + shift * (h.known_ts > after_ts)[:, None]) for h in panel.histories
    ]
    return replace(panel, histories=tuple(histories))


def test_the_correction_is_the_mean_of_what_had_matured_by_then(panel: Panel) -> None:
    rng = np.random.default_rng(0)
    rows = rng.permutation(np.flatnonzero(panel.usable))
    values = panel.y[rows] - rng.normal(0, 1, len(rows))
    of_mean, of_log = led(panel, values, rows, HALF_LIFE_DAYS)
    prior = PRIOR_PERIODS * panel.target.horizon
    for i in range(0, len(rows), 200):
        now = panel.ts[rows[i]]
        own = (panel.symbol[rows] == panel.symbol[rows[i]]) & (panel.known_ts[rows] <= now)
        age = (now - panel.known_ts[rows[own]]) / (HALF_LIFE_DAYS * DAY_MS)
        weight, error = 0.5**age, (panel.y[rows] - values)[own]
        total = weight.sum() + prior
        assert of_log[i] == pytest.approx((weight * error).sum() / total)
        assert of_mean[i] == pytest.approx(np.log(((weight * np.exp(error)).sum() + prior) / total))


def test_no_label_that_becomes_known_later_moves_a_level(panel: Panel) -> None:
    rows = np.flatnonzero(panel.usable)
    values = np.full(len(rows), panel.y[rows].mean())
    middle = int(np.median(panel.ts[rows]))
    before = panel.ts[rows] <= middle
    one = led(panel, values, rows, HALF_LIFE_DAYS)
    two = led(with_labels(panel, middle, 3.0), values, rows, HALF_LIFE_DAYS)
    for some, other in zip(one, two, strict=True):
        assert np.array_equal(some[before], other[before])
        assert not np.array_equal(some[~before], other[~before])


def test_a_symbol_that_was_never_seen_has_the_level_of_all(panel: Panel) -> None:
    rows = np.flatnonzero(panel.usable & (panel.symbol == 1))
    first = rows[panel.ts[rows] < panel.known_ts[rows].min()]
    of_mean, of_log = led(panel, np.zeros(len(rows)), rows, HALF_LIFE_DAYS)
    assert len(first)
    assert not of_mean[: len(first)].any()
    assert not of_log[: len(first)].any()


def test_a_forecast_that_is_too_low_for_long_is_lifted(panel: Panel) -> None:
    rows = np.flatnonzero(panel.usable)
    of_mean, _ = led(panel, panel.y[rows] - 1.0, rows, half_life_days=1e6)
    assert 0.5 < of_mean[-1] < 1.0


def test_only_log_variances_have_a_level() -> None:
    panel = make_panel(kind="direction")
    rows = np.flatnonzero(panel.usable)
    assert levels(panel, np.full(len(rows), 0.3), rows) == (0.0, 0.0)
    assert not led(panel, np.full(len(rows), 0.3), rows, HALF_LIFE_DAYS)[0].any()


def test_without_a_half_life_the_level_stays(panel: Panel) -> None:
    rows = np.flatnonzero(panel.usable)
    assert not led(panel, np.zeros(len(rows)), rows, 0.0)[0].any()
