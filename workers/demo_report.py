"""What the demo's report says: sections, words and pictures out of what the topics held."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from models import baselines
from models.running_loss import running_losses
from workers import report
from workers.config import MonitorSettings
from workers.joining import Holder
from workers.verdicts import ROW, Judge, Rows, rows_of

if TYPE_CHECKING:
    from workers.demo import Director, Evidence, Options, Story

SYMBOL = "SPY"
EVEN = 1.3
"""Attention whose heaviest lag has less than so many times the weight of the lightest is even."""


def sections(
    options: "Options",
    story: "Story",
    director: "Director",
    evidence: "Evidence",
    summary: dict[str, Any],
    promises: dict[str, bool],
) -> list[report.Section]:
    watched = {SYMBOL, *options.break_names}
    outcomes = evidence.outcomes[evidence.outcomes["symbol"].isin(watched)].sort_values("ts")
    marks = _marks(director)
    return [
        report.Section("What was promised", [_verdict(promises), *_told(promises)]),
        report.Section("What happened", [*_data(options, summary), *story.lines]),
        report.Section("What a trader sees", [], _volatilities(director, outcomes, marks)),
        report.Section(
            "How the loop watches itself",
            _alarms(director),
            [*_statistic(evidence, director, watched, marks), _losses(outcomes, marks)],
        ),
        report.Section("Where the network looks", [], [_attention(evidence)]),
        report.Section("What operations see", [], _operations(director, evidence)),
    ]


def _verdict(promises: dict[str, bool]) -> str:
    broken = sum(not held for held in promises.values())
    return "Every promise held." if not broken else f"{broken} of {len(promises)} promises broke."


def _told(promises: dict[str, bool]) -> list[str]:
    return [f"{'✓' if held else '✗ BROKEN:'} {promise}" for promise, held in promises.items()]


def _data(options: "Options", summary: dict[str, Any]) -> list[str]:
    return [
        f"Trained on {options.train}. Fed: {'; then '.join(summary['stretches'])}; "
        f"{summary['bars_in']:,} bars in all.",
        f"Simulated symbols have names with SIM (GARCH with fat tails). "
        f"{options.simulated_symbols} of them are load only: they trade in the first "
        f"{options.load_minutes} minutes of each session, and the monitor does not watch them. No "
        "alarm, retraining or verdict was set off by hand.",
    ]


def _alarms(director: "Director") -> list[str]:
    real_until = director.ends[0]
    on_real = [event for event in director.degradations if event.ts <= real_until]
    said = [
        "The statistic adds up how much worse the champion forecasts than a simple reference, which "
        "was frozen when the champion was trained. "
        + (
            f"A healthy champion crosses the threshold once in {director.degradations[0].arl0:,.0f} bars."
            if director.degradations
            else "It raised nothing."
        )
    ]
    promoted = [record for record in director.promotions if record.effective_ts <= real_until]
    refused = [record for record in director.refusals if record.effective_ts <= real_until]
    said.append(
        f"On the real bars it raised {len(on_real)} alarm(s); {len(promoted)} challenger(s) were "
        f"promoted and {len(refused)} refused."
    )
    if len(director.stretches) > 1:
        said.append(
            "Because no challenger was promoted on real bars, the swap is shown on simulated ones, to "
            "the right of the line that says so."
        )
    return said


def _marks(director: "Director") -> list[report.Mark]:
    marks = [report.Mark(kill.ts, f"replica {kill.replica} killed") for kill in director.kills]
    for start, end in zip([0, *director.ends], director.ends, strict=False):
        alarms = [event.ts for event in director.degradations if start < event.ts <= end]
        words = ["alarm", *[""] * len(alarms)]  # many follow while nothing answers the first
        marks += [
            report.Mark(ts, text, report.VERMILLION)
            for ts, text in zip(alarms, words, strict=False)
        ]
    marks += [
        report.Mark(record.effective_ts, "challenger in shadow", report.BLUE)
        for record in director.challengers
    ]
    marks += [
        report.Mark(record.effective_ts, "swap", report.GREEN) for record in director.promotions
    ]
    marks += [
        report.Mark(int(stretch.frame["ts"].iloc[0]), "simulated bars", report.BLACK)
        for stretch in director.stretches
        if stretch.simulated
    ]
    return marks + [
        report.Mark(record.effective_ts, "challenger refused") for record in director.refusals
    ]


def _volatilities(
    director: "Director", outcomes: pd.DataFrame, marks: list[report.Mark]
) -> list[report.Picture]:
    champion = outcomes[outcomes["role"] == "champion"]
    found = []
    for name, who, mask in (
        ("volatility", SYMBOL, champion["symbol"] == SYMBOL),
        ("volatility_simulated", "simulated symbols", champion["symbol"] != SYMBOL),
    ):
        part = champion[mask]
        if part.empty:
            continue
        first, last = part["ts"].min(), part["ts"].max()
        loss, reference = part["loss"].mean(), part["reference_loss"].mean()
        found.append(
            report.Picture(
                name,
                f"Forecasts {'beat' if loss < reference else 'do worse than'} the plain reference on "
                f"{who}: QLIKE {loss:.2f} against {reference:.2f}",
                "Thick: mean of a session; thin: mean of half an hour. Each forecast is made at the "
                "close of a minute for the 30 minutes after it, and drawn at the time it was made.",
                report.volatility(part, [m for m in marks if first <= m.ts <= last], who),
            )
        )
    return found


def _statistic(
    evidence: "Evidence", director: "Director", symbols: Collection[str], marks: list[report.Mark]
) -> list[report.Picture]:
    series = _replay_monitor(evidence, director, symbols)
    if series.empty:
        return []
    crossed = bool(director.degradations)
    title = "The alarm rises with the break" if crossed else "The alarm stays below its threshold"
    return [
        report.Picture(
            "statistic",
            title,
            "CUSUM of champion loss minus reference loss, in standard deviations of the difference "
            "on validation bars; it starts again after an alarm and with a new champion.",
            report.statistic(series, float(series["threshold"].max()), marks),
        )
    ]


def _replay_monitor(
    evidence: "Evidence", director: "Director", symbols: Collection[str]
) -> pd.DataFrame:
    """The statistic after each bar time: the monitor's own rules over bars and published forecasts."""
    config = next(iter(evidence.bundles.values())).config
    records = sorted(director.champions, key=lambda record: record.effective_ts)
    names, holders = sorted(symbols), [Holder(bundle, "champion") for bundle in evidence.bundles]
    judge = Judge(
        MonitorSettings(), config.features.interval_ms, [(0, name) for name in names], holders
    )
    judged = _running_rows(evidence, names, [holder.bundle for holder in holders])
    rows = []
    for some in np.split(judged, np.flatnonzero(np.diff(judged["ts"])) + 1):
        while records and records[0].effective_ts <= some["ts"].max(initial=-1):
            record = records.pop(0)
            judge.follow(record, evidence.bundles[record.bundle or ""].config.calibrations[0])
        judge.add(some)
        list(judge.verdicts())
        if judge.statistic is not None:
            rows.append((int(some["ts"][0]), *judge.statistic))
    return pd.DataFrame(rows, columns=["ts", "bundle", "statistic", "threshold"])


def _running_rows(evidence: "Evidence", names: Sequence[str], bundles: Sequence[str]) -> Rows:
    """ROW[n] of the champions' running losses, in the order of their bars."""
    said = evidence.predictions[evidence.predictions["role"] == "champion"]
    bars = evidence.log.bars
    of_symbol = np.array(bars.symbols, object)
    parts = [np.zeros(0, ROW)]
    for symbol, name in enumerate(names):
        own = np.flatnonzero(of_symbol == name)
        ts, ohlcv = bars.ts[own], bars.ohlcv[own]
        ts, first = np.unique(ts, return_index=True)
        ohlcv = ohlcv[first]
        for holder, version in enumerate(bundles):
            config = evidence.bundles[version].config
            target = config.targets[0]
            mine = said[
                (said["symbol"] == name)
                & (said["bundle"] == version)
                & (said["target"] == target.name)
            ]
            both = np.full((len(ts), 2), np.nan)
            at = np.searchsorted(ts, mine["ts"].to_numpy())
            variances = baselines.history(config.features, ts, ohlcv[:, 3])
            both[at, 0] = mine["value"]
            both[at, 1] = config.references[0].forecast(target, variances)[at]
            losses = running_losses(target, config.features, ts, ohlcv, both)
            parts.append(rows_of(ts, ts, symbol, holder, losses))
    judged = np.concatenate(parts)
    return judged[np.argsort(judged["ts"], kind="stable")]


def _losses(outcomes: pd.DataFrame, marks: list[report.Mark]) -> report.Picture:
    real = outcomes[(outcomes["role"] == "champion") & (outcomes["symbol"] == SYMBOL)]
    better = 100 * (1 - real["loss"].mean() / real["reference_loss"].mean())
    word = "smaller" if better > 0 else "larger"
    pooled = outcomes.groupby(["ts", "role", "bundle"], as_index=False)[
        ["loss", "reference_loss"]
    ].mean()
    return report.Picture(
        "losses",
        f"On real bars the champion's loss is {abs(better):.0f} % {word} than the reference's",
        "QLIKE of the forecast variance against the realised one, mean over the last 390 bar times. "
        "The reference is an exponentially weighted mean, frozen when the champion was trained.",
        report.losses(pooled, marks),
    )


def _attention(evidence: "Evidence") -> report.Picture:
    run = evidence.undisturbed
    by_lag = run.attention.mean(axis=0)
    lags, share = len(by_lag), 100 * by_lag[:5].sum()
    spread = by_lag.max() < EVEN * by_lag.min()
    return report.Picture(
        "attention",
        f"Attention is spread almost evenly over the last {lags} bars"
        if spread
        else f"The five newest bars get {share:.0f} % of the attention",
        f"Mean over the champion's forecasts for {SYMBOL}. Equal attention would be "
        f"{100 / run.attention.shape[1]:.1f} % in every cell. Weights show where the network looks, "
        "not why.",
        report.attention(run.attention_ts, run.attention),
    )


def _operations(director: "Director", evidence: "Evidence") -> list[report.Picture]:
    said = evidence.predictions
    log = evidence.log
    arrived = pd.DataFrame(
        {"symbol": log.bars.symbols, "ts": log.bars.ts, "bar_ms": log.created_ms}
    ).drop_duplicates(["symbol", "ts"])
    joined = said.merge(arrived, on=["symbol", "ts"])
    start = int(said["created_ms"].min())
    second = (joined["created_ms"] - start).to_numpy() / 1_000
    waited_ms = (joined["created_ms"] - joined["bar_ms"]).to_numpy(dtype=float)
    spans = [
        (max((k.from_ms - start) / 1_000, 0), (k.until_ms - start) / 1_000, f"{k.replica} is down")
        for k in director.kills
    ]
    return [
        report.Picture(
            "throughput",
            "Load comes in bursts at each open; a killed replica leaves a gap that is made up for",
            "Predictions of both roles and both replicas by wall time. The feed paces the sessions.",
            report.throughput(second, spans),
        ),
        report.Picture(
            "latency",
            f"Flat out, half of the predictions leave within {np.median(waited_ms) / 1_000:.1f} s",
            "From the moment the feed sent the bar to the moment the replica sent the prediction, "
            "before its transaction commits. The feed runs ahead of the workers on purpose, so this "
            "is mostly bars that wait in the log, more of them while a replica is away; `bench "
            "latency` measures a paced stream.",
            report.latency(second, waited_ms, spans),
        ),
    ]
