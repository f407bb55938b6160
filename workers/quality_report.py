"""The report on a running system: its alarms, retrains and promotions, out of registry and topics."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.bundle import Bundle, BundleRejected
from schemas.messages import (
    ARM_OF,
    ARM_SLOT_OF,
    ARM_SLOTS,
    CHALLENGERS,
    AttentionSummary,
    Degradation,
    InputDrift,
    Lifecycle,
    Outcome,
    Slot,
    TrainingRun,
)
from schemas.tables import AuditRow, WindowRow
from schemas.topics import ATTENTION, DEGRADATION, OUTCOMES, TRAINING
from workers import lifecycle, report
from workers.bundles import read_bundle
from workers.config import Settings
from workers.kafka import Tail, read_topic
from workers.store import Registry

LEVEL = 0.95
NORMAL = 1.96
"""Standard deviations to each side that hold `LEVEL`."""
LEAST_BATCHES, MOST_BATCHES = 8, 30
LAGS_SHOWN = 60
INPUTS_SHOWN = 3
OF_CHAMPION = ("champion", "control")


@dataclass(frozen=True)
class Evidence:
    """What registry and topics hold.

    `outcomes` are of one target: symbol, ts, role, bundle, loss, reference_loss. The role of what an arm
    acted on is the arm's slot; `champion` is acted on, and `control` stands beside an arm.
    """

    outcomes: pd.DataFrame
    alarms: list[Degradation]
    records: list[Lifecycle]
    runs: list[TrainingRun]
    windows: list[WindowRow]
    audit: list[AuditRow]
    problems: list[str]
    """What `Registry.verify` says."""
    bundles: dict[str, Bundle]
    attention: dict[str, dict[int, float]]
    """By bundle: how often each lag (in bars) was the heaviest, as a share."""


def write(settings: Settings, out: Path, per_partition: int = 200_000) -> Path:
    """Write the page and its pictures; its path. Reads at most so many outcomes of each partition."""
    found = gather(settings, per_partition)
    return report.write(
        out, "Quality of the forecasts, and what was done about it", summary(found), sections(found)
    )


def gather(settings: Settings, per_partition: int) -> Evidence:
    records = list(lifecycle.records(settings))
    bundles: dict[str, Bundle] = {}
    for record in records:
        if record.bundle is not None and record.bundle not in bundles:
            try:
                bundles[record.bundle] = read_bundle(settings, record.bundle, record.uri)
            except (BundleRejected, OSError):
                continue
    wanted = settings.monitor.target
    first = next(iter(bundles.values()), None)
    targets = first.config.targets if first else ()
    target = next((t.name for t in targets if wanted in (t.kind, t.name)), "")
    registry = Registry(settings.database_url)
    registry.create()
    try:
        audit, problems = registry.history(), registry.verify()
        windows = [row for version in bundles for row in registry.windows(version, target)]
    finally:
        registry.close()
    return Evidence(
        outcomes=_outcomes(settings, target, per_partition),
        alarms=_alarms(settings),
        records=records,
        runs=[
            TrainingRun.model_validate_json(m.value() or b"")
            for m in read_topic(settings, TRAINING)
        ],
        windows=windows,
        audit=audit,
        problems=problems,
        bundles=bundles,
        attention=_attention(settings, next(iter(bundles.values()), None), per_partition // 10),
    )


def summary(found: Evidence) -> dict[str, object]:
    champions = [r for r in found.records if r.slot == "champion"]
    return {
        "outcomes": len(found.outcomes),
        "alarms": len(found.alarms),
        "retrains": len({run.id for run in found.runs if run.status == "succeeded"}),
        "champions": len({r.bundle for r in champions}),
        "rolled back": sorted(lifecycle.rolled_back(champions)),
        "audit rows": len(found.audit),
        "audit": "as written" if not found.problems else "; ".join(found.problems),
    }


def sections(found: Evidence) -> list[report.Section]:
    return [
        report.Section("What happened", _told(found), _timeline(found)),
        report.Section("Do the alarms mean what they say?", *_calibration(found)),
        *_inputs(found),
        report.Section("Champions against challengers", *_comparisons(found)),
        *_arms(found),
        *(_card(version, bundle, found) for version, bundle in found.bundles.items()),
    ]


# ---- what happened ----


def _told(found: Evidence) -> list[str]:
    said = [
        f"{_when(row.at)} · {row.actor}: {row.slot}"
        f"{f' {row.from_bundle} →' if row.from_bundle else ''} {row.to_bundle or '(none)'}. {row.reason}"
        for row in found.audit
        if row.slot != "training" or row.evidence.get("status") != "running"
    ]
    return said or ["Nothing has happened yet."]


def marks(found: Evidence, first_ts: int, last_ts: int) -> list[report.Mark]:
    """Alarms, challengers, promotions and rollbacks at their bar times, within the outcomes shown."""
    made = [report.Mark(alarm.ts, "alarm", report.VERMILLION) for alarm in found.alarms]
    champion: Lifecycle | None = None
    for record in found.records:
        if record.slot in CHALLENGERS and record.bundle is not None:
            name = "weights" if record.slot == "weights" else "challenger"
            made.append(report.Mark(record.effective_ts, name, report.BLUE))
        if record.slot == "champion":
            if champion is not None:
                back = record.bundle == champion.parent
                made.append(
                    report.Mark(
                        record.effective_ts,
                        "rollback" if back else "promotion",
                        report.BLACK if back else report.GREEN,
                    )
                )
            champion = record
    return [mark for mark in made if first_ts <= mark.ts <= last_ts]


def _timeline(found: Evidence) -> list[report.Picture]:
    if found.outcomes.empty:
        return []
    pooled = found.outcomes.groupby(["ts", "role", "bundle"], as_index=False)[
        ["loss", "reference_loss"]
    ].mean()
    first, last = int(pooled["ts"].min()), int(pooled["ts"].max())
    champion = pooled[pooled["role"] == "champion"]
    better = champion["loss"].mean() < champion["reference_loss"].mean()
    window = max(min(390, len(champion) // 20), 10)
    return [
        report.Picture(
            "losses",
            f"{'Better' if better else 'Worse'} than the frozen reference over all: mean loss "
            f"{champion['loss'].mean():.3g} against {champion['reference_loss'].mean():.3g}",
            f"Mean over symbols, then over {window} bar times. Lines mark what happened and when it "
            "took effect.",
            report.losses(pooled, marks(found, first, last), window),
        )
    ]


# ---- calibration of the alarm ----


def observed_alarms(found: Evidence) -> pd.DataFrame:
    """By bundle: bar times judged as champion, its declared run length, alarms expected and raised."""
    rows = []
    champion = found.outcomes[found.outcomes["role"] == "champion"]
    for version, bundle in found.bundles.items():
        calibrated = next((c for c in bundle.config.calibrations if c is not None), None)
        bars = champion.loc[champion["bundle"] == version, "ts"].nunique()
        if calibrated is None or not bars:
            continue
        raised = sum(alarm.bundle == version for alarm in found.alarms)
        rows.append((version, bars, calibrated.arl0_bars, bars / calibrated.arl0_bars, raised))
    return pd.DataFrame(rows, columns=["bundle", "bars", "arl0", "expected", "raised"])


def at_least(n: int, expected: float) -> float:
    """Chance of n or more events where `expected` are expected (Poisson)."""
    fewer = sum(math.exp(k * math.log(expected) - expected - math.lgamma(k + 1)) for k in range(n))
    return max(1.0 - fewer, 0.0)


def _calibration(found: Evidence) -> tuple[list[str], list[report.Picture]]:
    table = observed_alarms(found)
    if table.empty:
        return ["No calibrated champion has been judged yet."], []
    expected, raised = float(table["expected"].sum()), int(table["raised"].sum())
    chance = at_least(raised, expected)
    said = [
        f"Over {int(table['bars'].sum()):,} judged bar times a champion without a fault raises "
        f"{expected:.2g} alarm(s) by chance, as declared; {raised} were raised. If nothing had been "
        f"wrong, so many or more would come with a probability of {chance:.2g}.",
    ]
    figure, axes = report.new_figure((11.0, 1.6 + 0.5 * len(table)))
    places = np.arange(len(table))
    axes.barh(places - 0.2, table["expected"], 0.36, color=report.GREY, label="declared: by chance")
    axes.barh(places + 0.2, table["raised"], 0.36, color=report.VERMILLION, label="raised")
    axes.set_yticks(places, table["bundle"])
    axes.invert_yaxis()
    axes.set_xlabel("alarms in the bar times that the bundle was champion")
    axes.legend(frameon=False)
    verdict = (
        "More alarms than chance explains"
        if chance < 1 - LEVEL
        else "No more alarms than by chance"
    )
    return said, [
        report.Picture(
            "calibration",
            f"{verdict}: {raised} raised, {expected:.2g} expected",
            "Expected: bar times judged, over the declared mean run length between false alarms.",
            figure,
        )
    ]


# ---- inputs beside the alarms ----


def _inputs(found: Evidence) -> list[report.Section]:
    measured = [(alarm, alarm.inputs) for alarm in found.alarms if alarm.inputs is not None]
    if not measured:
        return []
    said = [
        f"{_when(alarm.ts)} · {alarm.bundle}, alarm {alarm.id}: PSI {_named(drift.psi)}; "
        f"KS {_named(drift.ks)}{_moved(drift)}. Over {drift.rows:,} bars of "
        f"{len(drift.symbols)} symbol(s) up to {_when(drift.ts)}."
        for alarm, drift in measured
    ]
    said.append(
        "Where the newest inputs differ most from those that the bundle was made of. A calm or a wild "
        "day is always far from years: no alarm is ever raised by this, it says where to look."
    )
    return [report.Section("What the inputs looked like at the alarms", said)]


def _named(worst: Mapping[str, float]) -> str:
    return ", ".join(f"{value:.2f} ({name})" for name, value in list(worst.items())[:INPUTS_SHOWN])


def _moved(drift: InputDrift) -> str:
    if drift.embedding is None:
        return ""
    return f"; hidden states {drift.embedding:.2f} of their spread away"


# ---- champion against challenger ----


def comparisons(found: Evidence) -> pd.DataFrame:
    """By challenger: mean gain (champion loss minus its own) on the same bars, with its interval.

    The interval is for one look at all bars; the monitor decides by bets that may be looked at after
    every bar.
    """
    rows = []
    columns = ["role", "challenger", "champion", "bars", "gain", "half_width"]
    is_champion = found.outcomes["role"].isin(OF_CHAMPION)
    shadows, champions = found.outcomes[~is_champion], found.outcomes[is_champion]
    if shadows.empty:
        return pd.DataFrame(columns=columns)
    both = shadows.merge(champions, on=["symbol", "ts"], suffixes=("", "_champion"))
    both["gain"] = both["loss_champion"] - both["loss"]
    for names, part in both.groupby(["role", "bundle", "bundle_champion"], sort=False):
        bars, mean, half = _interval(found, part, "gain")
        if half is not None:
            rows.append((*map(str, names), bars, mean, half))
    return pd.DataFrame(rows, columns=columns)


def _comparisons(found: Evidence) -> tuple[list[str], list[report.Picture]]:
    table = comparisons(found)
    if table.empty:
        return ["No challenger has run beside a champion yet."], []
    won = int((table["gain"] - table["half_width"] > 0).sum())
    figure, axes = report.new_figure((11.0, 1.6 + 0.5 * len(table)))
    places = np.arange(len(table))
    axes.axvline(0, color=report.BLACK, linewidth=1)
    axes.errorbar(
        table["gain"], places, xerr=table["half_width"], fmt="o", color=report.BLUE, capsize=4
    )
    names = table["role"] + " " + table["challenger"].str[:8]
    axes.set_yticks(places, (names + " against " + table["champion"].str[:8]).tolist())
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlabel("loss of the champion minus loss of the other (right: the other is better)")
    return [], [
        report.Picture(
            "comparisons",
            f"{won} of {len(table)} were better than the champion beyond doubt on the bars of both",
            f"Mean over bar times and its {LEVEL:.0%} interval, made for one look at all bars.",
            figure,
        )
    ]


def arms(found: Evidence) -> pd.DataFrame:
    """By arm and bundle: symbols and bar times it acted on, mean loss there with its interval.

    The arms have other symbols, so their losses differ for that too: which forecasts better is said by
    `comparisons`, on the same bars.
    """
    rows = []
    slots: tuple[Slot, ...] = ("champion", *ARM_SLOTS)
    for slot in slots:
        acted = found.outcomes[found.outcomes["role"] == slot]
        for version, part in acted.groupby("bundle", sort=False):
            bars, mean, half = _interval(found, part, "loss")
            symbols = part["symbol"].nunique()
            rows.append((ARM_OF.get(slot, "a"), version, symbols, bars, mean, half or math.nan))
    return pd.DataFrame(rows, columns=["arm", "bundle", "symbols", "bars", "loss", "half_width"])


def _arms(found: Evidence) -> list[report.Section]:
    if not found.outcomes["role"].isin(ARM_SLOTS).any():
        return []
    said = [
        "Arm {arm} ({bundle}) acted on {symbols} symbol(s) over {bars:,} bar times: "
        "loss {loss:.4g} ± {half_width:.2g}.".format_map(row)
        for row in _rows(arms(found))
    ]
    for row in _rows(comparisons(found)):
        if row["role"] not in ARM_SLOTS:
            continue
        verdict = "undecided"
        if abs(row["gain"]) > row["half_width"]:
            verdict = "better" if row["gain"] > 0 else "worse"
        said.append(
            "{role} against the champion beside it, on the same {bars:,} bar times: loss lower by "
            "{gain:.4g} ± {half_width:.2g}, {verdict}.".format_map(row | {"verdict": verdict})
        )
    said.append(
        f"Means over bar times with their {LEVEL:.0%} intervals, made for one look. The monitor, which "
        "looks after every bar, ends an arm that is worse; to promote one is left to a person."
    )
    return [report.Section("Arms of the A/B test", said)]


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _interval(found: Evidence, part: pd.DataFrame, column: str) -> tuple[int, float, float | None]:
    """Bar times, mean over them, half the width of its interval; symbols of one bar time are one."""
    series = part.groupby("ts")[column].mean().to_numpy()
    bundle = found.bundles.get(str(part["bundle"].iloc[0]))
    horizon = bundle.config.targets[0].horizon if bundle else 1
    return len(series), float(series.mean()), half_width(series, horizon)


def half_width(series: NDArray[np.float64], horizon: int) -> float | None:
    """Of the interval of a mean, by batch means: labels overlap, so whole batches are compared.

    None where there are fewer than `LEAST_BATCHES` batches of two horizons.
    """
    batches = min(len(series) // (2 * horizon), MOST_BATCHES)
    if batches < LEAST_BATCHES:
        return None
    means = np.array([part.mean() for part in np.array_split(series, batches)])
    return float(NORMAL * means.std(ddof=1) / np.sqrt(batches))


# ---- a card for each bundle ----


def _card(version: str, bundle: Bundle, found: Evidence) -> report.Section:
    origin, config = bundle.provenance, bundle.config
    rows: list[tuple[str, str]] = [
        ("parent", origin.parent or "none"),
        (
            "trained on",
            f"{_day(origin.from_ts)} to {_day(origin.to_ts)}: {origin.bars:,} bars of {origin.symbols} symbol(s)",
        ),
        ("seed", str(origin.seed)),
        ("made by", ", ".join(f"{name} {v}" for name, v in sorted(origin.libraries.items()))),
        ("forecasts", ", ".join(t.name for t in config.targets)),
        *(
            (
                f"{t.name}, when trained",
                f"loss {loss:.4g}, reference {bundle.metrics[f'{t.name}/reference_loss']:.4g}",
            )
            for t in config.targets
            if isinstance(loss := bundle.metrics.get(f"{t.name}/loss"), float)
        ),
    ]
    live: dict[str, list[WindowRow]] = defaultdict(list)
    for window in found.windows:
        if window.bundle == version:
            live[window.role].append(window)
    for role, windows in live.items():
        n = sum(w.n for w in windows)
        loss = sum(w.n * w.mean_loss for w in windows) / n
        reference = sum(w.n * w.mean_reference_loss for w in windows) / n
        rows.append(
            (f"live, as {role}", f"loss {loss:.4g}, reference {reference:.4g} over {n:,} outcomes")
        )
    rows += [
        (f"{_when(row.at)}, {row.actor}", f"{row.slot}: {row.reason}")
        for row in found.audit
        if version in (row.to_bundle, row.from_bundle) and row.evidence.get("status") != "running"
    ]
    return report.Section(f"Bundle {version}", [], _attention_picture(version, found), rows)


def _attention_picture(version: str, found: Evidence) -> list[report.Picture]:
    shares = found.attention.get(version)
    if not shares:
        return []
    lags = np.array(sorted(lag for lag in shares if lag < LAGS_SHOWN))
    heights = 100 * np.array([shares[lag] for lag in lags])
    top = int(lags[int(np.argmax(heights))])
    figure, axes = report.new_figure((11.0, 3.0))
    axes.bar(lags, heights, color=report.BLUE)
    axes.set_xlabel("how many bars back the heaviest step lies (0 = the newest bar)")
    axes.set_ylabel("share of forecasts, %")
    return [
        report.Picture(
            f"attention-{version}",
            f"It looks most often {top} bar(s) back: in {heights.max():.0f} % of its forecasts",
            "Where the heaviest weight of the attention lies. A weight is no explanation by itself.",
            figure,
        )
    ]


# ---- reading ----


def _alarms(settings: Settings) -> list[Degradation]:
    """One of each id, as it was said last."""
    said = (
        Degradation.model_validate_json(m.value() or b"") for m in read_topic(settings, DEGRADATION)
    )
    return list({alarm.id: alarm for alarm in said}.values())


def _outcomes(settings: Settings, target: str, per_partition: int) -> pd.DataFrame:
    rows = []
    for message in read_topic(
        settings, OUTCOMES, from_offsets=_last(settings, OUTCOMES, per_partition)
    ):
        outcome = Outcome.model_validate_json(message.value() or b"")
        if outcome.target == target:
            rows.append(
                (
                    outcome.symbol,
                    outcome.ts,
                    ARM_SLOT_OF.get(outcome.arm, outcome.role),
                    outcome.bundle,
                    outcome.loss,
                    outcome.reference_loss,
                )
            )
    columns = ["symbol", "ts", "role", "bundle", "loss", "reference_loss"]
    return pd.DataFrame(rows, columns=columns).sort_values("ts", ignore_index=True)


def _attention(
    settings: Settings, bundle: Bundle | None, per_partition: int
) -> dict[str, dict[int, float]]:
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    if bundle is None:
        return {}
    for message in read_topic(
        settings, ATTENTION, from_offsets=_last(settings, ATTENTION, per_partition)
    ):
        said = AttentionSummary.model_validate_json(message.value() or b"")
        if said.top:
            counts[said.bundle][said.top[0].lag] += 1
    return {
        version: {lag: n / sum(lags.values()) for lag, n in lags.items()}
        for version, lags in counts.items()
    }


def _last(settings: Settings, topic: str, n: int) -> Mapping[int, int]:
    with Tail(settings, topic) as tail:
        return {partition: max(end - n, 0) for partition, end in tail.ends.items()}


def _when(at_ms: int) -> str:
    return f"{pd.Timestamp(at_ms, unit='ms'):%Y-%m-%d %H:%M:%S}"


def _day(ts: int) -> str:
    return f"{pd.Timestamp(ts, unit='ms'):%Y-%m-%d}"
