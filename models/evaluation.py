"""Walk-forward evaluation: the network against every rival, on the same rows, refitted as often.

    bars -> Panel -> parts of the walk -> fit, forecast -> levels -> losses -> rows, tests, curves

Shapes: n out-of-sample rows, T distinct times among them.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from models.blending import weigh
from models.bundle import library_versions
from models.features import DAY_MS, FEATURE_NAMES, WARM_UP_BARS
from models.forecasters import Forecaster, OppositeOfLastBar, rivals
from models.levels import led, levels
from models.panel import Floats, Ints, Panel, Part, day, walk
from models.recurrent import FAST as FAST_OPTIONS
from models.recurrent import Options, Recurrent
from models.scoring import loss
from models.shelf import Shelf
from models.significance import (
    by_time,
    calibration_error,
    diebold_mariano,
    mincer_zarnowitz,
    rank_correlation,
    reliability,
)
from models.training import Watcher

PLAIN, ATTENTION = "lstm", "lstm_attention"
PLAIN_MEAN, MEAN = "lstm_mean", "lstm_attention_mean"
BLEND, STACKED = "blend", "blend_stacked"
TREES: Final = "xgboost"
BENCHMARK: Final = {"volatility": "har_tod", "return": "zero", "direction": "majority"}
"""What gains, curves and symbols are measured against."""
BLENDED: Final = {
    "volatility": (TREES, "har_extended"),
    "return": (TREES, "linear"),
    "direction": (TREES, "linear"),
}
"""Beside the network: trees that bend, and a line that goes on where trees stop."""
OPPONENTS: Final = {
    "volatility": ("har", "har_tod", "har_extended", TREES, PLAIN, PLAIN_MEAN),
    "return": ("zero", "linear", TREES, PLAIN, PLAIN_MEAN),
    "direction": ("majority", "opposite_of_last_bar", "linear", TREES, PLAIN, PLAIN_MEAN),
}
CURVE_POINTS: Final = 400
MIN_SYMBOL_ROWS: Final = 100


class Protocol(BaseModel):
    """How the evaluation is done; the same for every model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out_of_sample: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the distinct bar times, the newest."""
    refits: Annotated[int, Field(ge=1)] = 2
    """Parts of equal length into which that is cut; all models are fitted anew before each."""
    history: Literal["expanding", "rolling"] = "expanding"
    """Whether a later fit sees all that came before it, or as much as the first fit."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the times before a part, the newest: early stopping, choices, levels."""
    level_days: Annotated[float, Field(ge=0)] = 60.0
    """Half-life of a symbol's matured errors, by which each model's level goes on; 0: it stays."""
    seeds: Annotated[int, Field(ge=1)] = 5
    tree_rounds: Annotated[int, Field(ge=1)] = 1500
    threads: Annotated[int, Field(ge=0)] = 0
    """For trees and networks; 0 leaves it to their libraries. More than there are idle cores is slow."""
    options: Options = Options()


FAST: Final = Protocol(refits=1, seeds=2, tree_rounds=200, options=FAST_OPTIONS)
"""To see that it runs: what it says of the network is too harsh."""


class Watch:
    """Told how far an evaluation is; `share` is of the whole."""

    def at(self, what: str, share: float) -> None: ...


class Walked(NamedTuple):
    """What one model said through a walk, before its level was set; v validation rows in all."""

    valid: Floats
    """f64[v]"""
    test: Floats
    """f64[n]"""
    seconds: Floats
    """[2], of fitting and of forecasting the test rows"""


@dataclass
class Outcome:
    """What one model said about all n rows, its level set."""

    values: list[Floats] = field(default_factory=list)
    """One forecast f64[n] for each seed; a model without a seed has one."""
    log_level: list[Floats] = field(default_factory=list)
    """As `values`, with the level of the mean log instead of the log of the mean."""
    seconds_fit: float = 0.0
    seconds_predict: float = 0.0

    def losses(self, panel: Panel, y: Floats) -> Floats:
        """f64[n], the mean over seeds of the loss of each."""
        return np.asarray(np.mean([loss(panel.target, v, y) for v in self.values], axis=0))


def evaluate(
    panel: Panel, protocol: Protocol, watch: Watch | None = None, keep: Path | None = None
) -> dict[str, Any]:
    """Everything measured, as JSON values: rows, protocol, parts, curves, symbols, calibration.

    Raises TooShort where the bars do not reach, ValueError for a direction of three classes.
    With `keep`, a folder, models that were done when a run of the same evaluation was cut are not
    fitted again.
    """
    if panel.target.n_outputs > 1:
        raise ValueError("a direction of three classes cannot be evaluated: take two classes")
    parts = walk(
        panel, protocol.out_of_sample, protocol.refits, protocol.validation, protocol.history
    )
    outcomes = forecast(panel, parts, protocol, watch or Watch(), keep)
    test = np.concatenate([part.test for part in parts])
    return {
        "rows": _rows(panel, test, outcomes),
        "protocol": _described(panel, parts, protocol),
        "symbols": _by_symbol(panel, test, outcomes),
        "curves": _curves(panel, test, outcomes),
        "calibration": _calibration(panel, test, outcomes),
    }


def forecast(
    panel: Panel,
    parts: Sequence[Part],
    protocol: Protocol,
    watch: Watch,
    keep: Path | None = None,
) -> dict[str, Outcome]:
    """Fit every model before each part, forecast its test rows, set levels; the blends among them."""
    plan = _Plan(panel, parts, protocol, watch)
    shelf = Shelf(
        keep, panel, protocol.model_dump(exclude={"seeds", "threads", "options", "level_days"})
    )
    options = protocol.options.model_dump(mode="json")
    found: dict[str, list[Walked]] = {}

    def take(forecaster: Forecaster, told: Mapping[str, Any]) -> None:
        walked = shelf.take(forecaster.name, told, lambda: plan.walk(forecaster)._asdict())
        found.setdefault(forecaster.name, []).append(Walked(**walked))

    for rival in rivals(panel, protocol.tree_rounds, protocol.threads):
        take(rival, {})
    for networks in plan.networks:
        for seed in networks.seeds:
            take(
                _Seed(networks, seed),
                {"options": options, "changes": networks.changes, "seed": seed},
            )
    watch.at("models", 1.0)
    for mean, name in ((PLAIN_MEAN, PLAIN), (MEAN, ATTENTION)):
        found[mean] = [_weighed(found[name], _equally, parts)]
    days = protocol.level_days
    outcomes = {name: _outcome(panel, parts, walks, days) for name, walks in found.items()}
    members = [
        _levelled(panel, parts, found[name][0], days)[0]
        for name in (MEAN, *BLENDED[panel.target.kind])
    ]
    for name, walked in _blends(panel, parts, members).items():
        outcomes[name] = _outcome(panel, parts, [walked], 0.0)
    return outcomes


class _Plan:
    def __init__(
        self, panel: Panel, parts: Sequence[Part], protocol: Protocol, watch: Watch
    ) -> None:
        self.panel, self.parts, self.watch = panel, parts, watch
        seeds = range(protocol.seeds)
        self.networks = [
            Recurrent(PLAIN, protocol.options, {"attention": "none"}, seeds, self._watchers),
            Recurrent(ATTENTION, protocol.options, {}, seeds, self._watchers),
        ]
        self.total = (len(rivals(panel)) + 2 * protocol.seeds) * len(parts)
        self.done, self.next, self.what = 0.0, 0.0, ""

    def walk(self, forecaster: Forecaster) -> Walked:
        """Through all parts; the level is set by what is said of rows that were not learnt from."""
        valid, test, seconds = [], [], np.zeros(2)
        for i, part in enumerate(self.parts):
            self.what = f"part {i + 1} of {len(self.parts)}: {forecaster.name}"
            self.watch.at(self.what, self.done / self.total)
            started, self.next = time.perf_counter(), 0.75
            forecaster.fit(self.panel, part)
            valid.append(forecaster.predict(self.panel, part.valid))
            self.done, self.next = self.done + 0.75, 0.25
            forecaster.finish(self.panel, part)
            fitted = time.perf_counter()
            test.append(forecaster.predict(self.panel, part.test))
            seconds += fitted - started, time.perf_counter() - fitted
            self.done += 0.25
        self.watch.at(self.what, self.done / self.total)
        return Walked(np.concatenate(valid), np.concatenate(test), seconds)

    def _watchers(self, seed: int) -> list[Watcher]:
        return [_Chunks(self)]


@dataclass
class _Seed:
    """One seed of a family of networks as a forecaster of its own."""

    networks: Recurrent
    seed: int

    @property
    def name(self) -> str:
        return self.networks.name

    def fit(self, panel: Panel, part: Part) -> None:
        self.networks.fit_seed(panel, part, self.seed)

    def finish(self, panel: Panel, part: Part) -> None:
        self.networks.finish_seed(panel, part, self.seed)

    def predict(self, panel: Panel, rows: Ints) -> Floats:
        return self.networks.predict_seed(panel, rows, self.seed)


class _Chunks:
    """Moves the bar while a network trains."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan

    def chunk(self, done: int, total: int, loss: float) -> None:
        plan = self.plan
        plan.watch.at(plan.what, (plan.done + 0.95 * plan.next * done / total) / plan.total)

    def epoch(self, epoch: Any, network: Any, sample: Any) -> None:
        pass


def _outcome(
    panel: Panel, parts: Sequence[Part], walks: Sequence[Walked], half_life_days: float
) -> Outcome:
    """Of walks that differ by their seed."""
    seconds = np.mean([walked.seconds for walked in walks], axis=0)
    outcome = Outcome(seconds_fit=float(seconds[0]), seconds_predict=float(seconds[1]))
    for walked in walks:
        of_mean, of_log = _levelled(panel, parts, walked, half_life_days)
        outcome.values.append(of_mean.test)
        outcome.log_level.append(of_log.test)
    return outcome


def _levelled(
    panel: Panel, parts: Sequence[Part], walked: Walked, half_life_days: float
) -> tuple[Walked, Walked]:
    """With the level of the log of the mean, and of the mean log."""
    made: list[list[Floats]] = [[], [], [], []]
    for part, valid, test in _by_part(parts, walked):
        rows, said = np.concatenate([part.valid, part.test]), np.concatenate([valid, test])
        of_mean, of_log = levels(panel, valid, part.valid)
        moved, _ = led(panel, said + of_mean, rows, half_life_days)
        _, moved_log = led(panel, said + of_log, rows, half_life_days)
        pair = (said + of_mean + moved, said + of_log + moved_log)
        for k, values in enumerate(pair):
            made[2 * k].append(values[: len(valid)])
            made[2 * k + 1].append(values[len(valid) :])
    valid, test, log_valid, log_test = map(np.concatenate, made)
    return Walked(valid, test, walked.seconds), Walked(log_valid, log_test, walked.seconds)


def _by_part(parts: Sequence[Part], walked: Walked) -> Iterator[tuple[Part, Floats, Floats]]:
    """With what was said of the validation and of the test rows of each."""
    valid = np.split(walked.valid, np.cumsum([len(part.valid) for part in parts])[:-1])
    test = np.split(walked.test, np.cumsum([len(part.test) for part in parts])[:-1])
    return zip(parts, valid, test, strict=True)


def _equally(valid: Floats, part: Part) -> Floats:
    return np.full(valid.shape[1], 1 / valid.shape[1])


def _blends(panel: Panel, parts: Sequence[Part], members: Sequence[Walked]) -> dict[str, Walked]:
    """Of members with their levels set: the equal-weight mean, and the stacked one; in logs, or
    probabilities.

    Stacked weights are those with the least loss on the validation part before each test, halfway
    to equal ones.
    """

    def stack(valid: Floats, part: Part) -> Floats:
        y = panel.y[part.valid]
        losses = np.stack([loss(panel.target, own, y) for own in valid.T], axis=1)
        judge = partial(loss, panel.target, label=y) if panel.target.kind == "volatility" else None
        return weigh("stacked", losses, valid, y, len(y) / panel.target.horizon, judge)

    return {
        BLEND: _weighed(members, _equally, parts),
        STACKED: _weighed(members, stack, parts),
    }


def _weighed(
    members: Sequence[Walked],
    shares: Callable[[Floats, Part], Floats],
    parts: Sequence[Part],
) -> Walked:
    """`shares` f64[M] of the members for each part, from what they said f64[v, M] of its validation rows."""
    valid, test = [], []
    for said in zip(*(_by_part(parts, member) for member in members), strict=True):
        part = said[0][0]
        of_valid, of_test = (np.stack([each[k] for each in said], axis=1) for k in (1, 2))
        weights = shares(of_valid, part)
        valid.append(of_valid @ weights)
        test.append(of_test @ weights)
    seconds = np.sum([member.seconds for member in members], axis=0)
    return Walked(np.concatenate(valid), np.concatenate(test), seconds)


# ---- what is reported ----


def _rows(panel: Panel, test: Ints, outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    kind, y, ts = panel.target.kind, panel.y[test], panel.ts[test]
    losses = {name: outcome.losses(panel, y) for name, outcome in outcomes.items()}
    scored = {name: _scores(kind, outcome, y) for name, outcome in outcomes.items()}
    benchmark = losses[BENCHMARK[kind]]
    rows = []
    for name, outcome in outcomes.items():
        row: dict[str, Any] = {"model": name, "n": len(y), "seeds": len(outcome.values)}
        for measure, found in scored[name].items():
            row[measure] = float(np.mean(found))
            if len(found) > 1:
                row[f"{measure}_sd"] = float(np.std(found, ddof=1))
        if name == OppositeOfLastBar.name:
            right = OppositeOfLastBar.right(panel, test, outcome.values[0])
            row["accuracy"] = float(right.mean())
        if kind == "volatility":
            for rival in ("har", "har_tod"):
                gain = 1 - row["mse_log"] / float(np.mean(scored[rival]["mse_log"]))
                row[f"r2_vs_{rival}"] = gain
        row |= _symbol_medians(panel, test, losses[name], benchmark, BENCHMARK[kind])
        row["loss_change_vs"] = {
            other: float(losses[name].mean() / losses[other].mean() - 1)
            for other in OPPONENTS[kind]
            if other != name
        }
        row["dm_vs"] = {
            other: diebold_mariano(
                by_time(ts, losses[name] - losses[other]), panel.target.horizon
            ).to_dict()
            for other in OPPONENTS[kind]
            if other != name
        }
        row["seconds_fit"] = outcome.seconds_fit
        row["seconds_predict"] = outcome.seconds_predict
        rows.append(row)
    return rows


def _scores(kind: str, outcome: Outcome, y: Floats) -> dict[str, list[float]]:
    """Measures by name, one value a seed."""
    if kind == "volatility":
        errors = [y - v for v in outcome.values]
        return {
            "qlike": [float((np.exp(e) - e - 1).mean()) for e in errors],
            "mse_log": [float(np.square(y - v).mean()) for v in outcome.log_level],
            "mse_variance": [
                float(np.square(np.exp(y) - np.exp(v)).mean()) for v in outcome.values
            ],
            "slope": [mincer_zarnowitz(v, y).slope for v in outcome.log_level],
        }
    if kind == "return":
        spread = float(np.square(y).mean())
        return {
            "mse": [float(np.square(y - v).mean()) for v in outcome.values],
            "r2_vs_zero": [1 - float(np.square(y - v).mean()) / spread for v in outcome.values],
            "ic": [rank_correlation(v, y) for v in outcome.values],
        }
    clipped = [np.clip(v, 1e-6, 1 - 1e-6) for v in outcome.values]
    return {
        "accuracy": [float(((v > 0.5) == (y > 0.5)).mean()) for v in outcome.values],
        "brier": [float(np.square(y - v).mean()) for v in outcome.values],
        "log_loss": [float(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()) for p in clipped],
        "ic": [rank_correlation(v, y) for v in outcome.values],
        "calibration_error": [calibration_error(reliability(v, y)) for v in outcome.values],
    }


def _symbol_medians(
    panel: Panel, test: Ints, losses: Floats, benchmark: Floats, name: str
) -> dict[str, Any]:
    own, rival, n = (_symbol_means(panel, test, each) for each in (losses, benchmark, None))
    counted = n >= min(MIN_SYMBOL_ROWS, n.max())
    change = own[counted] / rival[counted] - 1
    return {
        "symbol_median_loss": float(np.median(own[counted])),
        f"symbol_median_change_vs_{name}": float(np.median(change)),
        f"symbols_better_than_{name}": float((change < 0).mean()),
    }


def _symbol_means(panel: Panel, test: Ints, losses: Floats | None) -> Floats:
    owner, S = panel.symbol[test], len(panel.histories)
    n = np.bincount(owner, minlength=S).astype(np.float64)
    if losses is None:
        return n
    with np.errstate(invalid="ignore"):
        return np.asarray(np.bincount(owner, weights=losses, minlength=S) / n)


def _by_symbol(panel: Panel, test: Ints, outcomes: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    y = panel.y[test]
    n = _symbol_means(panel, test, None)
    means = {
        name: _symbol_means(panel, test, outcome.losses(panel, y))
        for name, outcome in outcomes.items()
    }
    return [
        {
            "symbol": history.symbol,
            "n": int(n[i]),
            "loss": {name: float(mean[i]) for name, mean in means.items()},
        }
        for i, history in enumerate(panel.histories)
        if n[i] > 0
    ]


def _curves(panel: Panel, test: Ints, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Cumulated loss difference to the benchmark, per row on average, over time (Welch, Goyal 2008)."""
    y, ts, name = panel.y[test], panel.ts[test], BENCHMARK[panel.target.kind]
    benchmark = outcomes[name].losses(panel, y)
    times = np.unique(ts)
    taken = np.unique(np.linspace(0, len(times) - 1, CURVE_POINTS).astype(int))
    curves = {
        other: np.cumsum(by_time(ts, outcome.losses(panel, y) - benchmark))[taken].tolist()
        for other, outcome in outcomes.items()
        if other != name
    }
    return {"against": name, "ts": times[taken].tolist(), "times": len(times), "sums": curves}


def _calibration(panel: Panel, test: Ints, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Mean outcome by tenths of the forecast; variances in their own units, not logs."""
    natural: Callable[[Floats], Floats] = (
        np.exp if panel.target.kind == "volatility" else lambda v: v
    )
    y = natural(panel.y[test])
    return {
        name: [asdict(b) for b in reliability(natural(np.mean(outcome.values, axis=0)), y)]
        for name, outcome in outcomes.items()
    }


def _described(panel: Panel, parts: Sequence[Part], protocol: Protocol) -> dict[str, Any]:
    tests = [part.fold.test for part in parts]
    days = [(span.to_ts - span.from_ts) / DAY_MS for span in tests]
    warm = int(np.concatenate([h.is_warm for h in panel.histories]).sum())
    label: dict[Literal["volatility", "return", "direction"], str] = {
        "volatility": "log of the mean squared close-to-close log return of the next steps, the "
        "return over a session break left out; bars whose horizon has no return at all have none",
        "return": "log return over the next steps",
        "direction": "1 if the log return over the next steps is above 0, else 0",
    }
    return {
        "target": panel.target.name,
        "label": label[panel.target.kind],
        "horizon_bars": panel.target.horizon,
        "bar_seconds": panel.spec.interval_ms / 1000,
        "timezone": panel.spec.timezone,
        "bars": len(panel.ts),
        "symbols": len(panel.histories),
        "from": day(int(panel.ts.min())),
        "to": day(int(panel.ts.max())),
        "warm_up_bars": WARM_UP_BARS,
        "warm_bars_without_label": warm - int(panel.usable.sum()),
        "inputs": len(FEATURE_NAMES),
        "out_of_sample": protocol.out_of_sample,
        "refits": len(parts),
        "history": protocol.history,
        "refit_every_days": float(np.mean(days)),
        "purge": "a training label was known before the next part starts",
        "level": "added to every log variance: log mean exp(residual) on the validation part; "
        "mse_log with the mean residual instead"
        + (
            f"; from there it follows each symbol's own errors whose labels were known by then, "
            f"with a half-life of {protocol.level_days:g} days"
            if protocol.level_days
            else ""
        ),
        "finish": "what was chosen by the validation part then learns from it too: networks by one "
        "more pass, trees grown anew with the rounds found",
        "benchmark": BENCHMARK[panel.target.kind],
        "dm": "Diebold-Mariano on losses summed over symbols by time, Newey-West with at least "
        "horizon and 1.3 sqrt(T) lags, Harvey correction, two-sided; networks: loss averaged over seeds",
        "blend": f"equal-weight mean of {', '.join((MEAN, *BLENDED[panel.target.kind]))}, "
        "in logs or probabilities, each with its level",
        "blend_stacked": "the same with the weights of least loss on the validation part, halfway to "
        "equal ones",
        "parts": [
            {
                "validation_from": day(part.fold.validation.from_ts),
                "test_from": day(part.fold.test.from_ts),
                "test_to": day(part.fold.test.to_ts),
                "fit": len(part.fit),
                "validation": len(part.valid),
                "test": len(part.test),
            }
            for part in parts
        ],
        "settings": protocol.model_dump(mode="json"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "libraries": library_versions(),
    }
