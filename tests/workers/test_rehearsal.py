"""The loop over a table of bars does what the workers do: alarm, remedy, shadow, verdict."""

from dataclasses import replace

import numpy as np
import pytest

from models.bundle import Bundle
from models.pipeline import Recipe, fit_bundle, forecast, score, shift_level
from models.simulation import Scenario, Simulator
from models.splits import Span
from models.targets import Target
from models.training import TrainingConfig
from tests.workers.test_monitor import CALM
from workers.config import MonitorSettings, Settings, TrainerSettings
from workers.rehearsal import Market, walk

TARGET = Target(kind="volatility", horizon=5)
MINUTE_MS, START_TS = 60_000, 1_500_000_000_000
FROM_TS = START_TS + 1_000 * MINUTE_MS
BARS = (
    Simulator(Scenario(symbols=2, session_bars=2_200), 0)
    .run(START_TS + MINUTE_MS * np.arange(2_200, dtype=np.int64))
    .frame()
)
RECIPE = Recipe(
    network={"hidden": 8, "layers": 1, "window": 8, "heads": 2, "attention_size": 8},
    training=TrainingConfig(epochs=2),
    burn_in=16,
    length=32,
)
SETTINGS = Settings(
    monitor=MonitorSettings(
        cool_down_bars=50, repeat_bars=1_950, probation_bars=100, max_shadow_bars=600
    ),
    trainer=TrainerSettings(
        cool_down_bars=50, least_new_bars=1, history_bars=900, fine_tune_epochs=1
    ),
)


@pytest.fixture(scope="module")
def sound() -> Bundle:
    return fit_bundle(BARS[BARS["ts"] < FROM_TS], (TARGET,), recipe=RECIPE, device="cpu")


@pytest.fixture(scope="module")
def too_low(sound: Bundle) -> Bundle:
    """Wrong by a constant, and with an alarm for it."""
    wrong = shift_level(sound, BARS[BARS["ts"] < FROM_TS], TARGET, 2.0)
    slack = CALM.model_copy(update={"mean": 0.2, "slack": 0.3})
    config = wrong.config.model_copy(update={"calibrations": (slack,)})
    return replace(wrong, config=config)


@pytest.fixture(scope="module")
def market(sound: Bundle) -> Market:
    return Market(sound, BARS)


def test_a_champion_that_is_left_alone_scores_as_it_does_offline(
    sound: Bundle, market: Market
) -> None:
    found = walk(market, sound, "never", FROM_TS, SETTINGS)
    scored = score(sound, market.past, forecast(sound, market.past, Span(FROM_TS, 10**15)))
    each = np.stack([s.losses[:, 0] for s in scored])
    offline = np.nanmean(each[:, np.isfinite(each).any(axis=0)], axis=0)
    assert found.outcomes["loss"].to_numpy() == pytest.approx(offline, abs=1e-4)
    assert found.cpu_seconds == 0.0
    assert {step.what for step in found.steps} <= {"alarm", "alarm_again"}


def test_a_level_that_is_wrong_is_found_and_put_right(too_low: Bundle, market: Market) -> None:
    never = walk(market, too_low, "never", FROM_TS, SETTINGS)
    found = walk(market, too_low, "alarm_at_once", FROM_TS, SETTINGS)
    assert [step.what for step in found.steps][:2] == ["alarm", "replaced"]
    assert found.cpu_seconds > 0
    late = FROM_TS + 800 * MINUTE_MS
    loss, unanswered = (
        w.outcomes.loc[w.outcomes["ts"] >= late, "loss"].mean() for w in (found, never)
    )
    assert loss < 0.6 * unanswered


def test_in_shadow_nothing_changes_until_the_verdict(too_low: Bundle, market: Market) -> None:
    found = walk(market, too_low, "alarm", FROM_TS, SETTINGS)
    [verdict, *_] = [step for step in found.steps if step.what in ("promoted", "refused")]
    assert [step.what for step in found.steps][:2] == ["alarm", "challenger"]
    before = found.outcomes[found.outcomes["ts"] <= verdict.ts]
    assert before["bundle"].unique().tolist() == [too_low.version]
    after = found.outcomes.loc[found.outcomes["ts"] > verdict.ts, "bundle"].iloc[0]
    assert after == (verdict.bundle if verdict.what == "promoted" else too_low.version)
