"""Every benchmark in small: that it runs, and that what it says hangs together. Figures are not judged."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from workers import cli
from workers.bench import latency, restore, scale, soak, step, swap
from workers.bench.fixtures import (
    PATH_MINUTES,
    PATHS,
    Market,
    WarmState,
    default_bundle,
    new_engine,
    silent_minutes,
)
from workers.cli.shared import show
from workers.config import Settings

FEW = 24
WINDOW = 6


@pytest.fixture(scope="module")
def state() -> WarmState:
    bundle = default_bundle(WINDOW)
    return WarmState.of(Market(3 * PATHS, 2, silent_minutes(bundle)), bundle)


def test_a_symbol_that_was_given_a_warm_state_speaks_as_one_that_saw_every_bar(
    state: WarmState,
) -> None:
    market, bundle = state.market, default_bundle(WINDOW)
    given, lived = new_engine(bundle), new_engine(bundle)
    numbers, partitions = [5, PATHS + 5], np.zeros(2, np.int64)
    given.load(0, *state.given_to(numbers))
    lived.load(0, *state.given_to([]))
    for minute in range(-market.warm_up_minutes, 3):
        bars = market.bars(minute, numbers)
        said = lived.process(bars, partitions).forecasts
        assert len(said) == (minute >= 0)
        if minute >= 0:
            (again,) = given.process(bars, partitions).forecasts
            np.testing.assert_allclose(again.values, said[0].values, atol=1e-6)


def test_bars_go_on_for_ever_without_a_jump(state: WarmState) -> None:
    closes = [state.market.bars(minute, [1]).ohlcv[0, 3] for minute in range(-50, 3 * PATH_MINUTES)]
    assert np.abs(np.diff(np.log(closes))).max() < 0.05


def test_step_measures_every_runtime_that_can_run_here() -> None:
    result = step.run(steps=20, window=WINDOW)
    assert {"torch"} <= {row["runtime"] for row in result["rows"]}
    assert all(0 < row["p50_us"] <= row["p99_us"] for row in result["rows"])


def test_scale_states_cost_and_memory_and_leaves_out_what_would_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scale, "_available_bytes", lambda: 2**30)
    result = scale.run((10, 200, 10**6), bars=400, window=WINDOW)
    assert [(row["symbols"], row["batch"]) for row in result["rows"]] == [(10, 10), (200, 200)]
    assert all(row["us_per_bar"] > 0 and row["bytes_per_symbol"] > 0 for row in result["rows"])
    assert [*result["skipped"]] == ["1000000"]


def test_what_is_not_json_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    show({"rows": [{"symbols": 1000, "us_per_bar": 9.5}], "bars": 5000}, json=False)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  symbols 1,000  us_per_bar 9.5",
        f"{'bars':34} 5,000",
    ]


def test_the_command_prints_one_json_object_and_nothing_else() -> None:
    done = CliRunner().invoke(
        cli.app, ["bench", "step", "--steps", "10", "--window", "4", "--json"]
    )
    assert done.exit_code == 0
    assert json.loads(done.stdout)["steps"] == 10


@pytest.mark.kafka
class TestOnKafka:
    def test_latency_is_measured_in_both_delivery_modes_and_at_a_minutes_close(
        self, fresh_topics: Settings
    ) -> None:
        result = latency.run(
            fresh_topics, 200, 0.5, FEW, minute_close_symbols=2 * FEW, closes=1, window=WINDOW
        )
        for mode in ("at_least_once", "exactly_once"):
            took = result[mode]
            assert 0 < took["p50_ms"] <= took["p99_ms"] <= took["p999_ms"]
        assert result["minute_close_symbols"] == 2 * FEW
        assert 0 < result["minute_close_ms"] <= result["minute_close_worst_ms"]

    def test_restore_counts_from_the_kill_to_a_bar_that_came_after_it(
        self, fresh_topics: Settings
    ) -> None:
        result = restore.run(fresh_topics, FEW, 2 * FEW, WINDOW)
        phases = result["phases_s"]
        assert result["replayed_bars"] == 2 * FEW
        assert 0 < phases["started"] <= phases["restored"] <= phases["first_live_prediction"]
        assert result["seconds_to_first_live_prediction"] == phases["first_live_prediction"]

    @pytest.mark.parametrize("shadow", [True, False])
    def test_a_swap_under_load_is_timed_and_misses_nothing(
        self, fresh_topics: Settings, shadow: bool
    ) -> None:
        result = swap.run(fresh_topics, 300, 80, WINDOW, shadow)
        assert result["missing"] == 0
        assert result["by_champion"] + result["by_successor"] == 300 * 80
        assert result["by_champion"] > 0
        assert 0 < result["median_cycle_ms"] <= result["max_cycle_ms"]

    def test_a_soak_looks_at_memory_at_half_the_highest_rate(self, fresh_topics: Settings) -> None:
        result = soak.run(fresh_topics, 0.05, FEW, probe_minutes=2_000, window=WINDOW)
        assert result["rate"] > 0
        assert result["bars"] > 0
        assert 10 < result["rss_mb_start"] < 10_000
        assert 10 < result["rss_mb_end"] <= result["rss_mb_most"]
