"""The quality loop over bars in a table: the monitor's own judge and the trainer's own remedies, no Kafka.

Time stands still while a remedy is made, as if training took no longer than `trainer.lead_bars`; what
it costs is counted in CPU seconds. Everything else is what the workers do.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models import baselines
from models.bundle import Bundle
from models.dataset import OHLCV, History, histories, load_bars
from models.pipeline import forecast
from models.remedy import apply, choose, lesson, recent_excess
from models.running_loss import pair_bars, running_losses, runs_up
from models.scoring import Floats, loss
from models.splits import Span
from schemas.messages import Challenger, Policy, Role, Slot
from workers import lifecycle
from workers.config import Settings
from workers.joining import Holder
from workers.retraining import epochs_of
from workers.verdicts import Decision, Judge, challenger_slots, rows_of
from workers.watch import Alarm

Strategy = Literal["never", "daily", "daily_bias", "alarm", "alarm_at_once"]
"""Of answering: not at all; with a fine-tune or a bias correction after each session, put in charge
at once; by alarm, remedy and shadow, as the workers do; the same without the shadow."""
STRATEGIES: tuple[Strategy, ...] = ("never", "daily", "daily_bias", "alarm", "alarm_at_once")

BLOCK_BARS = 30
AHEAD_MS = 28 * 24 * 3_600_000
"""Event time that a bundle forecasts in one go, when it is first asked."""
NIGHT_MS = 2 * 3_600_000


@dataclass(frozen=True)
class Step:
    """Something that happened to the slots, or an alarm."""

    what: Literal[
        "alarm", "alarm_again", "challenger", "promoted", "refused", "rolled_back", "replaced"
    ]
    ts: int
    bundle: str
    why: str = ""


@dataclass
class Walk:
    """What came of one strategy over the bars."""

    strategy: Strategy
    steps: list[Step] = field(default_factory=list)
    outcomes: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Of the champion of the time: ts, bundle, loss, reference_loss; a mean over symbols a bar time."""
    cpu_seconds: float = 0.0
    """Spent on remedies."""

    def count(self, what: str) -> int:
        return sum(step.what == what for step in self.steps)


class Market:
    """Bars of all time with features, labels and reference variances, computed once."""

    def __init__(self, bundle: Bundle, bars: pd.DataFrame) -> None:
        config = bundle.config
        self.bars = load_bars(bars)
        self.target = config.targets[0]
        self.runs_up = runs_up(self.target)
        self.interval_ms = config.features.interval_ms
        self.past: list[History] = histories(self.bars, config.features, config.targets)
        self.variances = [
            baselines.history(config.features, h.ts, h.ohlcv[:, OHLCV.index("close")])
            for h in self.past
        ]
        self.times: NDArray[np.int64] = np.unique(self.bars["ts"].to_numpy(np.int64))

    def until(self, ts: int, bars_each: int) -> pd.DataFrame:
        """What the log would hold at the close of bar `ts`."""
        known = self.bars[self.bars["ts"] <= ts]
        return known.groupby("symbol").tail(bars_each)


class _Forecasts:
    """Losses of one bundle in one role, computed some weeks ahead when first asked for."""

    def __init__(self, bundle: Bundle, market: Market, from_ts: int, role_from_ts: int) -> None:
        self.bundle, self._market = bundle, market
        self._said: list[Floats] = [np.full(len(h.ts), np.nan) for h in market.past]
        self._matured: list[Floats] = []
        self._judged: list[Floats] = []
        self._until_ts, self._role_from_ts = from_ts, role_from_ts

    def rows(
        self, span: Span, symbol_rows: Sequence[slice], holder: int
    ) -> tuple[NDArray[np.void], NDArray[np.void]]:
        """ROW[n] of the bars of the span: what the judge goes by, and losses of matured forecasts."""
        while self._until_ts < span.to_ts:
            self._look_ahead()
        judged, matured = [], []
        for i, rows in enumerate(symbol_rows):
            h = self._market.past[i]
            known_ts = h.ts[rows] if self._market.runs_up else h.known_ts[rows]
            judged.append(rows_of(h.ts[rows], known_ts, i, holder, self._judged[i][rows]))
            matured.append(rows_of(h.ts[rows], known_ts, i, holder, self._matured[i][rows]))
        return np.concatenate(judged), np.concatenate(matured)

    def _look_ahead(self) -> None:
        market, until = self._market, self._until_ts + AHEAD_MS
        # A label that matures after the span's end is none: look a week further, keep what counts.
        wide = Span(self._until_ts, until + AHEAD_MS // 4)
        new = forecast(self.bundle, market.past, wide)
        self._until_ts = until
        self._matured, self._judged = [], []
        reference = self.bundle.config.references[0]
        for h, own, variances, newer in zip(
            market.past, self._said, market.variances, new, strict=True
        ):
            own[np.isnan(own)] = newer[np.isnan(own), 0]
            both = np.stack([own, reference.forecast(market.target, variances)], axis=1)
            matured = loss(market.target, both, h.y[:, :1])
            self._matured.append(matured)
            if market.runs_up:
                both[h.ts < self._role_from_ts] = np.nan
                spec = self.bundle.config.features
                matured = running_losses(market.target, spec, h.ts, h.ohlcv, both)
            self._judged.append(matured)


def walk(
    market: Market, champion: Bundle, strategy: Strategy, from_ts: int, settings: Settings
) -> Walk:
    """Serve the bars from `from_ts` on with `champion`, then with what the strategy makes of it."""
    return _Walker(market, champion, strategy, from_ts, settings).run()


class _Walker:
    def __init__(
        self, market: Market, champion: Bundle, strategy: Strategy, from_ts: int, settings: Settings
    ) -> None:
        self._market, self._settings = market, settings
        self._walk = Walk(strategy)
        self._from_ts = from_ts
        self._holders: list[Holder] = []
        self._bundles: dict[str, Bundle] = {}
        self._forecasts: dict[tuple[str, int], _Forecasts] = {}
        """By role and the bar time from which a bundle has it."""
        self._tried: set[Policy] = set()
        self._answered_ts = -(10**15)
        self._answered: tuple[str, int] | None = None
        """The alarm that was answered last: champion, and since when it is worse."""
        self._champion, self._champion_from_ts = champion, from_ts
        self._challengers: dict[Slot, tuple[Bundle, int]] = {}
        """In shadow, each from a bar time on."""
        self._retired: set[str] = set()
        symbols = [(0, h.symbol) for h in market.past]
        pairs = pair_bars(market.target)
        self._judge = Judge(settings.monitor, market.interval_ms, symbols, self._holders, pairs)
        self._take("champion", champion, from_ts, None)

    def run(self) -> Walk:
        parts = []
        for block, closes_session in self._blocks():
            span = Span(int(block[0]), int(block[-1]) + 1)
            rows = [
                slice(*np.searchsorted(h.ts, (span.from_ts, span.to_ts)).tolist())
                for h in self._market.past
            ]
            mine, matured = self._rows(
                self._champion, "champion", self._champion_from_ts, span, rows
            )
            parts.append(matured[["ts", "holder", "loss", "reference_loss"]])
            judged = [mine]
            for challenger, from_ts in self._challengers.values():
                shadow, _ = self._rows(challenger, "challenger", from_ts, span, rows)
                judged.append(shadow[shadow["ts"] >= from_ts])
            self._judge.add(np.concatenate(judged))
            now_ts = int(block[-1])
            for verdict in list(self._judge.verdicts(whole=[0])):
                if isinstance(verdict, Alarm):
                    self._on_alarm(verdict, now_ts)
                else:
                    self._on_decision(verdict, now_ts)
            if closes_session and self._walk.strategy in ("daily", "daily_bias"):
                policy: Policy = "fine_tune" if self._walk.strategy == "daily" else "bias"
                self._replace(self._remedy(policy, now_ts, now_ts), now_ts)
        table = pd.DataFrame(np.concatenate(parts))
        table["bundle"] = [self._holders[i][0] for i in table.pop("holder")]
        self._walk.outcomes = table.groupby(["ts", "bundle"], as_index=False).mean()
        return self._walk

    def _blocks(self) -> Iterator[tuple[NDArray[np.int64], bool]]:
        times = self._market.times[self._market.times >= self._from_ts]
        sessions = np.split(times, np.flatnonzero(np.diff(times) > NIGHT_MS) + 1)
        for session in sessions:
            for i in range(0, len(session), BLOCK_BARS):
                yield session[i : i + BLOCK_BARS], i + BLOCK_BARS >= len(session)

    def _rows(
        self, bundle: Bundle, role: Role, from_ts: int, span: Span, rows: Sequence[slice]
    ) -> tuple[NDArray[np.void], NDArray[np.void]]:
        holder = Holder(bundle.version, role)
        if holder not in self._holders:
            self._holders.append(holder)
        key = role + bundle.version, from_ts
        if key not in self._forecasts:
            self._forecasts[key] = _Forecasts(bundle, self._market, span.from_ts, from_ts)
        return self._forecasts[key].rows(span, rows, self._holders.index(holder))

    def _on_alarm(self, alarm: Alarm, now_ts: int) -> None:
        what: Literal["alarm", "alarm_again"] = "alarm_again" if alarm.repeats else "alarm"
        self._walk.steps.append(Step(what, now_ts, alarm.bundle, f"{alarm.statistic:.1f}"))
        if alarm.roll_back_to is not None and alarm.roll_back_to in self._bundles:
            self._retired.add(alarm.bundle)
            parent = self._bundles[alarm.roll_back_to]
            self._walk.steps.append(Step("rolled_back", now_ts, parent.version))
            self._take("champion", parent, now_ts, None)
        elif self._is_answered(alarm, now_ts):
            self._answered_ts, self._answered = now_ts, (alarm.bundle, alarm.since_ts)
            child = self._remedy(None, alarm.since_ts, now_ts, alarm.bars)
            if self._walk.strategy == "alarm_at_once":
                self._replace(child, now_ts)
            else:
                slot, from_ts = self._free_slots()[0], self._soon(now_ts)
                self._challengers[slot] = child, from_ts
                self._take(slot, child, from_ts, self._champion.version)

    def _is_answered(self, alarm: Alarm, now_ts: int) -> bool:
        """By the rules of `workers.trainer.reason_against`."""
        trainer = self._settings.trainer
        if self._walk.strategy not in ("alarm", "alarm_at_once") or not self._free_slots():
            return False
        if alarm.bars < trainer.least_new_bars:
            return False
        quiet_until = self._answered_ts + trainer.cool_down_bars * self._market.interval_ms
        return now_ts >= quiet_until or self._answered == (alarm.bundle, alarm.since_ts)

    def _free_slots(self) -> list[Challenger]:
        slots = challenger_slots(self._settings.monitor)
        return [slot for slot in slots if slot not in (*self._challengers, "weights")]

    def _on_decision(self, decision: Decision, now_ts: int) -> None:
        challenger, _ = self._challengers.pop(decision.slot)
        won = decision.evidence.verdict == "promote" and challenger.version not in self._retired
        what: Literal["promoted", "refused"] = "promoted" if won else "refused"
        self._walk.steps.append(Step(what, now_ts, challenger.version))
        self._judge.follow(
            lifecycle.clear(decision.slot, effective_ts=now_ts, reason=what, actor="monitor"), None
        )
        if won:
            self._take("champion", challenger, self._soon(now_ts), self._champion.version)

    def _replace(self, child: Bundle, now_ts: int) -> None:
        self._walk.steps.append(Step("replaced", now_ts, child.version))
        self._take("champion", child, self._soon(now_ts), None)

    def _take(self, slot: Slot, bundle: Bundle, from_ts: int, parent: str | None) -> None:
        self._bundles[bundle.version] = bundle
        if slot == "champion":
            self._champion, self._champion_from_ts = bundle, from_ts
            self._tried = set()
        else:
            self._walk.steps.append(Step("challenger", from_ts, bundle.version))
        probation = 0 if self._judge.alarm_is_open else self._settings.monitor.probation_bars
        record = lifecycle.fill(
            slot,
            bundle,
            "here",
            effective_ts=from_ts,
            reason="rehearsal",
            actor="rehearsal",
            parent=parent,
            evidence={"probation_bars": probation},
        )
        self._judge.follow(record, bundle.config.calibrations[0])

    def _remedy(
        self, policy: Policy | None, since_ts: int, now_ts: int, new_bars: int | None = None
    ) -> Bundle:
        """A child of the champion, as `workers.retraining` makes it."""
        started = time.process_time()
        trainer, target = self._settings.trainer, self._market.target
        bars = self._market.until(now_ts, trainer.history_bars)
        found = recent_excess(self._champion, bars, target, since_ts)
        chosen = policy or choose(found, self._tried, new_bars)
        self._tried.add(chosen)
        learnt = lesson(chosen, self._champion, bars, since_ts, epochs_of(chosen, trainer))
        child = apply(chosen, self._champion, *learnt, target, found.shift, device="cpu")
        self._walk.cpu_seconds += time.process_time() - started
        return child

    def _soon(self, now_ts: int) -> int:
        return now_ts + self._settings.trainer.lead_bars * self._market.interval_ms
