import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from models.ablation import ablate, variants
from models.dataset import load_bars
from models.evaluation import ATTENTION, BLEND, MEAN, PLAIN, Protocol, Watch, evaluate
from models.features import DAY_MS
from models.forecasters import Trees, _returns
from models.panel import Panel, TooShort, build, infer_spec, walk
from models.recurrent import Options, Recurrent, raw_outputs
from models.scaling import Scaler
from models.shelf import Shelf
from models.targets import Target
from models.training import TrainingConfig
from tests.models.builders import MINUTE_MS, make_bars, make_frame
from workers import evaluate_report

TINY = Options(
    network={"hidden": 4, "layers": 1, "window": 8, "heads": 1, "attention_size": 4},
    training=TrainingConfig(epochs=1),
    refresh=TrainingConfig(epochs=1),
    batch=8,
    length=32,
    burn_in=16,
    chunks_per_stream=4,
)
PROTOCOL = Protocol(refits=2, seeds=2, tree_rounds=30, options=TINY)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_panel(
    bars: pd.DataFrame | None = None, kind: str = "volatility", horizon: int = 4
) -> Panel:
    bars = load_bars(make_frame(2, 1800) if bars is None else bars)
    return build(bars, infer_spec(bars), Target.model_validate({"kind": kind, "horizon": horizon}))


class Heard(Watch):
    def __init__(self) -> None:
        self.shares: list[float] = []
        self.models: set[str] = set()

    def at(self, what: str, share: float) -> None:
        self.shares.append(share)
        self.models.add(what.split(": ")[-1])


@pytest.fixture(scope="module", params=["volatility", "return", "direction"])
def result(request: pytest.FixtureRequest) -> dict[str, Any]:
    return evaluate(make_panel(kind=request.param), PROTOCOL)


def rows_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["model"]: row for row in result["rows"]}


def test_every_model_is_scored_on_the_same_rows(result: dict[str, Any]) -> None:
    rows = rows_of(result)
    assert {PLAIN, ATTENTION, MEAN, BLEND, "xgboost", "linear"} <= set(rows)
    assert len({row["n"] for row in rows.values()}) == 1
    assert all(row["seconds_fit"] >= 0 and row["dm_vs"] for row in rows.values())
    if result["protocol"]["target"].startswith("volatility"):
        assert {"last_value", "ewma", "garch", "har", "har_tod", "har_extended"} <= set(rows)
        assert all(row["qlike"] >= 0 and row["mse_log"] > 0 for row in rows.values())


def test_the_result_is_json_without_a_nan(result: dict[str, Any]) -> None:
    json.dumps(result, allow_nan=False)


def test_networks_tell_how_much_their_seeds_differ(result: dict[str, Any]) -> None:
    row = rows_of(result)[ATTENTION]
    measure = evaluate_report.measure_of(result)
    assert row["seeds"] == 2
    assert row[f"{measure}_sd"] >= 0


def test_the_page_needs_no_other_file(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    evaluate_report.write(path, result)
    page = path.read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page
    assert "blend" in page


def test_the_bar_only_moves_forward_and_arrives() -> None:
    heard = Heard()
    evaluate(make_panel(), PROTOCOL.model_copy(update={"refits": 1}), heard)
    assert heard.shares == sorted(heard.shares)
    assert heard.shares[-1] == pytest.approx(1.0)


def test_the_parts_tile_the_end_of_the_file_and_never_overlap_what_they_learn_from() -> None:
    panel = make_panel(horizon=12)
    parts = walk(panel, 0.25, 3)
    times = np.unique(panel.ts)
    assert parts[0].fold.test.from_ts == times[round(0.75 * len(times))]
    assert parts[-1].fold.test.to_ts > times[-1]
    for before, after in pairwise(parts):
        assert before.fold.test.to_ts == after.fold.test.from_ts
    for part in parts:
        assert panel.known_ts[part.fit].max() < part.fold.validation.from_ts
        assert panel.known_ts[part.valid].max() < part.fold.test.from_ts
        assert panel.ts[part.test].min() >= part.fold.test.from_ts
    everything = np.concatenate([part.test for part in parts])
    assert len(np.unique(everything)) == len(everything)


def test_network_forecasts_do_not_depend_on_later_bars() -> None:
    frame = make_frame(2, 1800)
    panel = make_panel(frame)
    part = walk(panel, 0.25, 1)[0]
    networks = Recurrent("lstm", TINY, {}, [0])
    networks.fit(panel, part)
    middle = int(np.median(panel.ts[part.test]))
    frame.loc[frame["ts"] > middle, ["open", "high", "low", "close"]] *= 1.7
    other = build(load_bars(frame), panel.spec, panel.target)
    before = part.test[panel.ts[part.test] <= middle]
    assert np.array_equal(networks.predict(panel, before), networks.predict(other, before))


def test_the_same_seed_gives_the_same_forecasts() -> None:
    panel = make_panel()
    part = walk(panel, 0.25, 1)[0]
    one, two = (Recurrent("lstm", TINY, {}, [3]) for _ in range(2))
    one.fit(panel, part)
    two.fit(panel, part)
    assert np.array_equal(one.predict(panel, part.test), two.predict(panel, part.test))


def test_forecasting_in_pieces_equals_one_carried_run() -> None:
    panel = make_panel()
    part = walk(panel, 0.25, 1)[0]
    networks = Recurrent("lstm", TINY, {}, [0])
    networks.fit(panel, part)
    trained = networks.trained[0]
    network, scaler = trained.network, trained.scaler
    rows = part.test[panel.symbol[part.test] == 1]
    history = panel.histories[1]
    warm = int(np.flatnonzero(history.is_warm)[0])
    with torch.inference_mode():
        whole, _, _ = network(torch.from_numpy(scaler.transform(history.x[warm:]))[None])
    expected = whole[0, :, 0].double().numpy()[rows - panel.bounds[1] - warm]
    pieces = raw_outputs(network, scaler, panel, rows, burn_in=10_000, piece_rows=100)
    np.testing.assert_allclose(pieces, expected, atol=1e-5)


def test_a_later_part_goes_on_from_the_weights_and_the_scaler_of_the_one_before() -> None:
    panel = make_panel()
    first, second = walk(panel, 0.25, 2)
    networks = Recurrent("lstm", TINY, {}, [0])
    networks.fit(panel, first)
    scaler = networks.trained[0].scaler
    networks.fit(panel, second)
    assert networks.trained[0].scaler is scaler


def test_a_hidden_feature_changes_nothing() -> None:
    panel = make_panel()
    part = walk(panel, 0.25, 1)[0]
    networks = Recurrent("lstm", TINY, {}, [0], hidden=[0, 5])
    networks.fit(panel, part)
    before = networks.predict(panel, part.test)
    panel.x[:, [0, 5]] = 7.0
    assert np.array_equal(before, networks.predict(panel, part.test))


@pytest.mark.parametrize(
    ("options", "horizon"),
    [
        ({"interval_ms": MINUTE_MS, "session_bars": 390}, 30),
        ({"interval_ms": 60 * MINUTE_MS, "session_bars": None}, 6),
        ({"interval_ms": DAY_MS, "session_bars": None}, 1),
    ],
    ids=["minutes", "hours around the clock", "days"],
)
def test_it_runs_on_bars_of_any_length(options: dict[str, Any], horizon: int) -> None:
    frame = make_frame(2, 1800, **options)
    panel = make_panel(frame, horizon=horizon)
    assert panel.spec.interval_ms == options["interval_ms"]
    found = rows_of(evaluate(panel, PROTOCOL.model_copy(update={"refits": 1, "seeds": 1})))
    assert found[BLEND]["qlike"] < found["last_value"]["qlike"]


def test_a_fortyfold_jump_of_volume_does_no_harm() -> None:
    frame = make_frame(2, 1800)
    quiet = rows_of(evaluate(make_panel(frame.copy()), PROTOCOL))
    late = frame["ts"] > frame["ts"].quantile(0.7)
    frame.loc[late, "volume"] *= 40
    loud = rows_of(evaluate(make_panel(frame), PROTOCOL))
    for model in ("linear", "xgboost", ATTENTION):
        assert loud[model]["qlike"] == pytest.approx(quiet[model]["qlike"], rel=0.25), model


@pytest.mark.parametrize("n", [20, 300, 420, 700])
def test_too_short_a_file_says_which_part_is_too_short(n: int) -> None:
    with pytest.raises(TooShort, match=r"bars"):
        evaluate(make_panel(make_frame(1, n)), PROTOCOL)


def test_three_classes_are_refused_with_a_way_out() -> None:
    bars = load_bars(make_frame(1, 1200))
    panel = build(bars, infer_spec(bars), Target(kind="direction", horizon=3, classes=3))
    with pytest.raises(ValueError, match="two classes"):
        evaluate(panel, PROTOCOL)


def test_the_zone_of_an_exchange_shows_in_its_openings() -> None:
    days = pd.bdate_range("2020-01-01", "2020-12-31")
    opens = [
        pd.Timestamp(day).tz_localize("America/New_York") + pd.Timedelta("9h30min") for day in days
    ]
    ts = np.concatenate([int(o.timestamp() * 1000) + np.arange(78) * 5 * MINUTE_MS for o in opens])
    _, ohlcv = make_bars(len(ts))
    frame = pd.DataFrame(ohlcv, columns=["open", "high", "low", "close", "volume"])
    frame.insert(0, "ts", ts)
    frame.insert(0, "symbol", "X")
    assert infer_spec(load_bars(frame)).timezone == "America/New_York"
    assert infer_spec(load_bars(frame), "Asia/Tokyo").timezone == "Asia/Tokyo"


def test_a_market_that_never_closes_is_in_utc() -> None:
    bars = load_bars(make_frame(1, 2000, interval_ms=60 * MINUTE_MS, session_bars=24))
    assert infer_spec(bars).timezone == "UTC"


def test_the_rule_of_the_opposite_is_told_apart_from_the_majority() -> None:
    frame = make_frame(1, 1800)
    drift = np.exp(1e-3 * np.arange(len(frame)))  # rises are likelier after either
    frame[["open", "high", "low", "close"]] *= drift[:, None]
    panel = make_panel(frame, "direction", horizon=1)
    rows = rows_of(evaluate(panel, PROTOCOL.model_copy(update={"refits": 1, "seeds": 1})))
    test = walk(panel, PROTOCOL.out_of_sample, 1, PROTOCOL.validation)[0].test
    rose = np.diff(panel.histories[0].ohlcv[:, 3]) > 0
    opposite = (~rose[test - 1] == rose[test]).mean()
    assert rows["opposite_of_last_bar"]["accuracy"] == pytest.approx(opposite, abs=0.01)
    assert rows["majority"]["accuracy"] > opposite + 0.03


def on(days: pd.DatetimeIndex, *hours: float) -> pd.DataFrame:
    """Bars of one symbol at these hours of these days, UTC."""
    opened = np.add.outer(days.to_numpy("datetime64[ms]").astype(np.int64), np.array(hours) * 3.6e6)
    _, ohlcv = make_bars(opened.size)
    frame = pd.DataFrame(ohlcv, columns=["open", "high", "low", "close", "volume"])
    return load_bars(frame.assign(symbol="X", ts=opened.astype(np.int64).ravel()))


WEEKDAYS = pd.bdate_range("2020-01-01", "2020-12-31", holidays=["2020-05-27"], freq="C")


@pytest.mark.parametrize(
    "bars",
    [
        on(WEEKDAYS, 0),
        on(WEEKDAYS, 5),
        on(WEEKDAYS, -9),
        on(WEEKDAYS, 9.5, 13.5),
        on(WEEKDAYS, *range(9, 12), *range(13, 17)),
    ],
    ids=["days", "days of New York", "days of Tokyo", "a night of five steps", "an hour of lunch"],
)
def test_no_closed_hour_counts_as_bars_that_did_not_move(bars: pd.DataFrame) -> None:
    panel = build(bars, infer_spec(bars), Target(kind="direction", horizon=1))
    (one,) = panel.histories
    rose = np.diff(one.ohlcv[:, 3]) > 0
    steps = _returns(one, panel.spec)[1][1:] == 1
    assert steps.mean() > 0.4
    np.testing.assert_array_equal(one.y[:-1, 0][steps], rose[steps])
    flat = build(bars, infer_spec(bars), Target(kind="volatility", horizon=1))
    assert np.isnan(flat.y).sum() == np.isnan(panel.y).sum(), "each step has a bar"


def test_a_weekend_is_one_step_between_daily_bars() -> None:
    days = WEEKDAYS[:80]
    bars = on(days, 0)
    history = build(bars, infer_spec(bars), Target(kind="return", horizon=5)).histories[0]
    log_close = np.log(history.ohlcv[:, 3])
    np.testing.assert_allclose(history.y[:-5, 0], log_close[5:] - log_close[:-5])


def test_around_the_clock_absent_bars_are_filled() -> None:
    bars = on(pd.date_range("2020-01-01", "2020-12-31"), *range(0, 24, 4))
    bars = bars[np.arange(len(bars)) % 11 > 0]
    assert infer_spec(bars).max_fill == 12


def test_bars_too_rare_to_tell_an_open_hour_by_are_filled() -> None:
    bars = on(pd.date_range("2020-01-01", "2021-06-30"), 0)
    bars["ts"] += 60_000 * np.random.default_rng(0).integers(0, 1_438, len(bars))
    pairs = pd.concat([bars, bars.assign(ts=bars["ts"] + 60_000)])
    assert infer_spec(load_bars(pairs)).max_fill == 12


def test_ablations_compare_with_the_network_as_it_is() -> None:
    names = [v.name for v in variants(TINY)]
    assert len(set(names)) == len(names)
    panel = make_panel()
    windows = "windows, cross-attention to hours"
    only = ["as it is", "no attention", "one network a symbol", "without volume", windows]
    rows = ablate(panel, PROTOCOL, seeds=1, only=only)
    assert {row["variant"] for row in rows} == set(only)
    assert rows[0]["variant"] == "as it is"
    assert rows[0]["change"] == 0
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_a_scaler_of_infinite_scale_hides_a_column() -> None:
    scaler = Scaler("standard", np.array([1.0, 2.0]), np.array([1.0, np.inf]))
    assert scaler.transform(np.array([[3.0, 9.0]])).tolist() == [[2.0, 0.0]]


def test_a_run_that_was_cut_goes_on_to_the_same_result(tmp_path: Path) -> None:
    panel, protocol = make_panel(), PROTOCOL.model_copy(update={"refits": 1})

    class Cut(Watch):
        def at(self, what: str, share: float) -> None:
            if ATTENTION in what and share > 0.92:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(panel, protocol, Cut(), tmp_path)
    kept = {path.name for path in tmp_path.iterdir()}
    assert len(kept) == 8 + 2 + 1, "all rivals, both seeds without attention, one with it"
    heard = Heard()
    resumed = evaluate(panel, protocol, heard, tmp_path)
    assert heard.models == {ATTENTION, "models"}, "one fit was left"
    again = evaluate(panel, protocol)
    for row, other in zip(resumed["rows"], again["rows"], strict=True):
        assert row["qlike"] == other["qlike"], row["model"]


def test_what_was_kept_of_other_bars_or_options_is_not_taken(tmp_path: Path) -> None:
    panel = make_panel()
    shelf = Shelf(tmp_path, panel, {"validation": 0.15})
    shelf.take("one", {"seed": 0}, lambda: {"said": np.zeros(1)})
    others = (
        (Shelf(tmp_path, panel, {"validation": 0.2}), {"seed": 0}),
        (shelf, {"seed": 1}),
        (Shelf(tmp_path, make_panel(make_frame(2, 1801)), {"validation": 0.15}), {"seed": 0}),
    )
    for other, options in others:
        assert other.take("one", options, lambda: {"said": np.ones(1)})["said"] == 1
    assert shelf.take("one", {"seed": 0}, lambda: {"said": np.ones(1)})["said"] == 0


def test_finishing_learns_from_the_validation_part_but_from_nothing_later() -> None:
    panel = make_panel()
    part = walk(panel, 0.25, 1)[0]
    for forecaster in (Trees(20, threads=1), Recurrent("lstm", TINY, {}, [0])):
        forecaster.fit(panel, part)
        before = forecaster.predict(panel, part.test)
        forecaster.finish(panel, part)
        assert not np.array_equal(before, forecaster.predict(panel, part.test))
    other = replace(panel, histories=tuple(replace(h, y=h.y.copy()) for h in panel.histories))
    for history in other.histories:
        history.y[history.ts >= part.fold.test.from_ts] += 5.0
    said = []
    for bars in (panel, other):
        network = Recurrent("lstm", TINY, {}, [0])
        network.fit(bars, part)
        network.finish(bars, part)
        said.append(network.predict(bars, part.test))
    assert np.array_equal(said[0], said[1]), "labels of the test rows were learnt"
