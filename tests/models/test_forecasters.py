from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from models.dataset import load_bars
from models.features import DAY_MS
from models.forecasters import (
    Ewma,
    Forecaster,
    Garch,
    LastValue,
    OppositeOfLastBar,
    Regression,
    Trees,
    expected_variance,
    fit_garch,
    har,
    rivals,
)
from models.panel import Panel, Part, build, infer_spec, walk
from models.targets import Target
from tests.models.builders import make_frame

KINDS = ("volatility", "return", "direction")


def make_panel(
    kind: str = "volatility", horizon: int = 6, n: int = 1500, **options: float
) -> Panel:
    bars = load_bars(make_frame(2, n))
    return build(bars, infer_spec(bars), Target.model_validate({"kind": kind, "horizon": horizon}))


def first_part(panel: Panel) -> Part:
    return walk(panel, 0.3, 1)[0]


@pytest.fixture(scope="module", params=KINDS)
def panel(request: pytest.FixtureRequest) -> Panel:
    return make_panel(request.param)


def after(panel: Panel, ts: int, seed: int = 0) -> Panel:
    """The same bars up to `ts`, and rubbish after it."""
    rng = np.random.default_rng(seed)
    frame = make_frame(2, 1500)
    late = frame["ts"] > ts
    for column in ("open", "high", "low", "close"):
        frame.loc[late, column] *= np.exp(rng.normal(0, 0.2, late.sum()))
    frame["high"] = frame[["open", "high", "low", "close"]].max(axis=1)
    frame["low"] = frame[["open", "high", "low", "close"]].min(axis=1)
    return build(load_bars(frame), panel.spec, panel.target)


def garch_returns(
    n: int, level: float, alpha: float, beta: float, seed: int
) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    r, variance = np.empty(n), level
    for i in range(n):
        r[i] = rng.normal() * np.sqrt(variance)
        variance = level * (1 - alpha - beta) + alpha * r[i] ** 2 + beta * variance
    return r


def test_every_rival_forecasts_every_row_with_a_finite_number(panel: Panel) -> None:
    part = first_part(panel)
    names = []
    for rival in rivals(panel, rounds=5, threads=1):
        rival.fit(panel, part)
        values = rival.predict(panel, part.test)
        assert values.shape == part.test.shape
        assert np.isfinite(values).all()
        if panel.target.kind == "direction":
            assert ((values >= 0) & (values <= 1)).all()
        names.append(rival.name)
    assert len(set(names)) == len(names)


def test_no_rival_sees_a_bar_after_the_one_it_forecasts_from(panel: Panel) -> None:
    part = first_part(panel)
    middle = int(np.median(panel.ts[part.test]))
    other = after(panel, middle)
    before = part.test[panel.ts[part.test] <= middle]
    for rival in rivals(panel, rounds=5, threads=1):
        rival.fit(panel, part)
        assert np.array_equal(rival.predict(panel, before), rival.predict(other, before)), (
            rival.name
        )


def test_fitting_sees_nothing_of_the_test_span(panel: Panel) -> None:
    part = first_part(panel)
    other = after(panel, part.fold.test.from_ts - 1)
    rows = part.valid
    for one, two in zip(
        rivals(panel, rounds=5, threads=1), rivals(other, rounds=5, threads=1), strict=True
    ):
        one.fit(panel, part)
        two.fit(other, first_part(other))
        assert np.array_equal(one.predict(panel, rows), two.predict(panel, rows)), one.name


@pytest.mark.parametrize(
    "make",
    [
        lambda panel: LastValue(),
        lambda panel: Ewma(),
        lambda panel: Garch(),
        har,
        lambda panel: Trees(40, threads=1),
    ],
)
def test_volatility_is_forecast_better_than_by_its_mean(make: object) -> None:
    panel = make_panel(n=3000)
    part = first_part(panel)
    rival: Forecaster = make(panel)  # type: ignore[operator]
    rival.fit(panel, part)
    y = panel.y[part.test]
    error = y - rival.predict(panel, part.test)
    assert (error - error.mean()).var() < 0.95 * y.var()


@pytest.mark.parametrize("make", [LastValue, Ewma, Garch])
def test_a_price_that_stands_still_is_never_without_variance(make: type[Forecaster]) -> None:
    frame = make_frame(1, 3000)
    close = 100 * np.exp(np.cumsum(garch_returns(3000, 1e-6, 0.1, 0.9, seed=1)))
    close[2300:2900] = close[2299]
    bars = load_bars(frame.assign(open=close, high=close, low=close, close=close))
    panel = build(bars, infer_spec(bars), Target(kind="volatility", horizon=6))
    model, part = make(), first_part(panel)
    model.fit(panel, part)
    assert model.predict(panel, part.test).min() >= np.quantile(panel.y[part.train], 0.01)


def test_shuffled_labels_leave_no_skill() -> None:
    panel = make_panel(n=3000)
    rng = np.random.default_rng(0)
    shuffled = [replace(h, y=rng.permutation(h.y)) for h in panel.histories]
    panel = replace(panel, histories=tuple(shuffled))
    part = first_part(panel)
    model = har(panel)
    model.fit(panel, part)
    error = panel.y[part.test] - model.predict(panel, part.test)
    assert error.var() > 0.97 * panel.y[part.test].var()


def test_garch_finds_the_parameters_that_made_the_returns() -> None:
    found = fit_garch(garch_returns(30_000, 1e-6, 0.08, 0.90, seed=3), at_least=500)
    assert found is not None
    level, alpha, beta = found
    assert alpha == pytest.approx(0.08, abs=0.015)
    assert beta == pytest.approx(0.90, abs=0.02)
    assert level == pytest.approx(1e-6, rel=0.2)


def test_garch_agrees_with_the_package_arch() -> None:
    arch = pytest.importorskip("arch", reason="the package arch is not installed")
    r = garch_returns(4000, 1.0, 0.1, 0.85, seed=4)
    theirs = arch.arch_model(r, mean="Zero", rescale=False).fit(disp="off").params
    ours = fit_garch(r, at_least=500)
    assert ours is not None
    assert ours[1] == pytest.approx(theirs["alpha[1]"], abs=0.01)
    assert ours[2] == pytest.approx(theirs["beta[1]"], abs=0.01)


@pytest.mark.parametrize("r", [np.zeros(2000), np.full(10, 0.01), np.full(900, np.nan)])
def test_returns_without_a_story_have_no_garch(r: NDArray[np.float64]) -> None:
    assert fit_garch(r, at_least=500) is None


def test_a_symbol_without_history_borrows_the_garch_of_the_others() -> None:
    frame = make_frame(2, 2500)
    late = frame[(frame["symbol"] == "S0") | (frame["ts"] > frame["ts"].quantile(0.6))]
    bars = load_bars(late)
    panel = build(bars, infer_spec(bars), Target(kind="volatility", horizon=6))
    part = first_part(panel)
    model = Garch()
    model.fit(panel, part)
    assert "S1" not in model._own
    young = part.test[panel.symbol[part.test] == 1]
    assert len(young) > 0
    assert np.isfinite(model.predict(panel, young)).all()


def test_regression_is_least_squares_when_the_penalty_is_nothing() -> None:
    panel = make_panel()
    part = first_part(panel)
    model = Regression("two", ["log_rv_12", "log_rv_78"])
    model.fit(panel, part)
    x = model._scaler.transform(panel.x[part.train][:, model._columns]).astype(np.float64)
    design = np.hstack([x, np.ones((len(x), 1))])
    best, *_ = np.linalg.lstsq(design, panel.y[part.train], rcond=None)
    error = np.square(panel.y[part.train] - design @ best).mean()
    ours = np.square(panel.y[part.train] - model.predict(panel, part.train)).mean()
    assert ours == pytest.approx(error, rel=1e-2)


def test_the_level_makes_the_ratio_of_realised_to_forecast_one_on_average() -> None:
    rng = np.random.default_rng(5)
    forecast = rng.normal(-10, 1, 1000)
    y = forecast + rng.normal(0.3, 1.2, 1000)
    shifted = forecast + expected_variance(forecast, y)
    assert np.exp(y - shifted).mean() == pytest.approx(1.0)


def test_a_bar_that_opens_a_session_has_no_opposite() -> None:
    bars = load_bars(make_frame(2, 1500))
    bars = bars[bars["ts"] % DAY_MS < 21 * 3_600_000]  # three hours without a bar are a break
    panel = build(bars, infer_spec(bars), Target(kind="direction", horizon=6))
    model, part = OppositeOfLastBar(), first_part(panel)
    model.fit(panel, part)
    assert model.predict(panel, part.test).min() > 0.1
