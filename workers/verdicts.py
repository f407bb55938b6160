"""What losses say about a champion and its rivals: alarms, promotions, refusals, rollbacks.

Pure: losses (`workers.scoring`) and lifecycle records go in, verdicts come out. Losses are pooled
over symbols by bar time, and a bar time is settled when every partition that is not idle has gone on,
so that the verdicts do not depend on how partitions interleave.

Rivals are the challengers and the arms of an A/B test: each is compared with the champion on the
bars of both (in an arm, with what the champion says beside it). The slots for challengers share
`alpha`, so that of all that run at once one no better than the champion is promoted with a chance
of `alpha` at most (Bonferroni's inequality, on Ville's for each).
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.comparison import Comparison, Evidence, Rule
from models.drift import Calibration, passing
from schemas.messages import ARM_OF, ARM_SLOTS, CHALLENGERS, Challenger, Lifecycle, Slot
from workers.config import MonitorSettings
from workers.joining import Holder
from workers.watch import Alarm, ChampionWatch, Point

GRACE_BARS = 5
"""Bar times that wait for symbols with absent bars, whose labels mature later."""
LEAST_SCALE = 0.01
"""Of the standard deviation of the champion's differences: finer ones are not bet upon boldly."""
FALSE_SYMBOLS = 0.1
"""Share at most of the symbols named in an alarm that are expected to be named wrongly."""
MOST_SYMBOLS = 50
"""Named in an alarm, the worst first."""
PASSED_OVER_ROWS = 16_384
"""Rows of a partition after the last one of a holder from which it is not waited for any more: a
transaction of the inference worker, which writes all rows of one holder and then those of the next,
is over by then."""
ENDLESS = 2**62

ROW = np.dtype(
    [
        ("ts", "i8"),
        ("matured_ts", "i8"),
        ("partition", "i8"),
        ("symbol", "i8"),
        ("holder", "i8"),
        ("loss", "f8"),
        ("reference_loss", "f8"),
    ]
)
"""One loss, of the bar `ts`, known at `matured_ts`; `symbol` is a place in the judge's `symbols`,
`holder` one in its `holders`."""

Rows = NDArray[np.void]


def rows_of(
    ts: NDArray[np.int64],
    matured_ts: NDArray[np.int64],
    symbol: int,
    holder: int,
    losses: NDArray[np.float64],
) -> Rows:
    """ROW of one symbol and holder in partition 0: of losses f64[n, 2] those that there are."""
    rows = np.zeros(len(ts), ROW)
    rows["ts"], rows["matured_ts"], rows["symbol"], rows["holder"] = ts, matured_ts, symbol, holder
    rows["loss"], rows["reference_loss"] = losses.T
    return rows[np.isfinite(losses).all(axis=1)]


@dataclass(frozen=True)
class Decision:
    """A comparison has ended: `evidence.verdict` is promote or refuse; an arm is only ever refused."""

    slot: Slot
    champion: str
    rival: str
    ts: int
    evidence: Evidence


@dataclass
class _Rival:
    holder: Holder
    effective_ts: int
    """Of the record that named it."""
    from_ts: int
    """Where the comparison with the present champion begins."""
    comparison: Comparison
    decided: bool = False


class Judge:
    """Of one target. `follow` lifecycle records, `add` outcomes, then ask for `verdicts`."""

    _pool: list[Rows]
    _newest: dict[int, dict[Holder, int]]
    """By assigned partition, of each holder that is waited for if it has a say."""
    _passed: dict[tuple[int, Holder], int]
    """Rows of a partition after the last one of a holder."""
    _seen_ts: dict[int, int]
    """Up to where the symbols' own statistics have gone; behind the rest only in a replay."""
    _own: NDArray[np.float64]
    """By symbol: its own CUSUM, sum and number of its differences since that left zero, and of all."""
    _rank: NDArray[np.int64]

    def __init__(
        self,
        settings: MonitorSettings,
        interval_ms: int,
        symbols: Sequence[tuple[int, str]],
        holders: Sequence[Holder],
        pair_bars: int = 1,
    ) -> None:
        """`symbols` as (partition, name) and `holders` may grow later on; `pair_bars` as in `Comparison`."""
        self._settings, self._interval_ms, self._pair_bars = settings, interval_ms, pair_bars
        self._symbols, self._holders = symbols, holders
        self._watch = frozenset(settings.watch)
        self._champion: ChampionWatch | None = None
        self._rivals: dict[Slot, _Rival] = {}
        self._reset([])
        self._settled_ts = -1
        self.dropped: Counter[str] = Counter()

    def follow(self, record: Lifecycle, calibration: Calibration | None) -> None:
        """Take a record of any slot; the same one again does nothing."""
        if record.slot == "champion":
            self._follow_champion(record, calibration)
            return
        held = self._rivals.get(record.slot)
        if record.bundle is None:
            self._rivals.pop(record.slot, None)
        elif held is None or (held.holder.bundle, held.effective_ts) != _term(record):
            self._rivals[record.slot] = self._new_rival(
                record.slot, record.bundle, record.effective_ts
            )

    def add(self, rows: Rows) -> None:
        """Losses ROW[n] of any bundle and role, in the order of their partition."""
        for partition in np.unique(rows["partition"]).tolist():
            self._hear(partition, rows[rows["partition"] == partition])
        if self._watch:
            rows = rows[self._is_watched(rows["symbol"])]
        late = rows["ts"] <= self._settled_ts
        if late.any():  # not so where a replay brings back what a snapshot's symbols have not seen
            late &= rows["ts"] <= self._seen(rows["partition"])
            self.dropped["late"] += int(late.sum())
            rows = rows[~late]
        if len(rows):
            self._pool.append(rows)

    def verdicts(
        self, idle: Collection[int] = (), whole: Collection[int] = ()
    ) -> Iterator[Alarm | Decision]:
        """Settle every bar time that is complete, oldest first; `idle` partitions are not waited for.

        In `whole` partitions no transaction is half read: what has not come to a bar does not come.
        Elsewhere champion and rivals are all waited for.

        A verdict on the champion or a rival is made once: what follows from it comes back as
        a lifecycle record. How often an alarm is raised is for `workers.watch`.
        """
        complete = max(self._complete_before(idle, whole), self._settled_ts + 1)
        if not any((rows["ts"] < complete).any() for rows in self._pool):
            return
        rows = self._pooled_rows()
        ready = rows["ts"] < complete
        self._pool = [rows[~ready]]
        rows = rows[ready]
        rows = rows[np.lexsort((rows["holder"], self._ranks()[rows["symbol"]], rows["ts"]))]
        gains = {slot: self._gains(rows, rival) for slot, rival in self._rivals.items()}
        champions = rows[self._of_champion(rows)]
        again = champions["ts"] <= self._settled_ts
        self._weigh_symbols(
            champions[again & (champions["ts"] > self._seen(champions["partition"]))]
        )
        champions = champions[~again]
        first, means, z = self._by_time(champions)
        places = {int(champions["ts"][i]): k for k, i in enumerate(first[:-1].tolist())}
        weighed = 0
        for ts in np.unique(rows["ts"][rows["ts"] > self._settled_ts]).tolist():
            self._settled_ts = ts
            held = self._champion
            if held is not None and (k := places.get(ts)) is not None:
                end = int(first[k + 1])
                held.weigh(ts, float(means[k]), float(z[k]))
                if held.is_due:
                    self._weigh_symbols(champions[weighed:end])
                    weighed = end
                    if alarm := held.alarm(ts, self._guilty()):
                        yield from self._not_ahead(ts) if alarm.repeats else ()
                        yield alarm
            for slot, by_time in gains.items():
                if ts in by_time and (decision := self._weigh_rival(slot, ts, *by_time[ts])):
                    yield decision
        self._weigh_symbols(champions[weighed:])
        self._seen_ts = dict.fromkeys(self._newest, self._settled_ts)

    # ---- what is shown ----

    @property
    def statistic(self) -> tuple[str, float, float] | None:
        """Champion, statistic, threshold."""
        held = self._champion
        if held is None or held.calibration is None:
            return None
        return held.bundle, held.detector.get().statistic, held.detector.threshold

    @property
    def evidence(self) -> dict[Slot, tuple[str, float, Evidence]]:
        """Of each rival: its bundle, the level that decides, what there is."""
        return {
            slot: (rival.holder.bundle, rival.comparison.rule.alpha, rival.comparison.get())
            for slot, rival in self._rivals.items()
        }

    @property
    def alarm_is_open(self) -> bool:
        return self._champion is not None and self._champion.alarm_is_open

    @property
    def trace(self) -> list[Point]:
        """The champion's statistic of late, as far as this process has seen it."""
        return list(self._champion.trace) if self._champion else []

    # ---- state ----

    def to_json(self) -> str:
        """All but the pool and the symbols: some hundred bytes, committed with the offsets."""
        state: dict[str, Any] = {"settled_ts": self._settled_ts}
        if self._champion is not None:
            state["champion"] = self._champion.export()
        state["rivals"] = {
            slot: {
                "bundle": rival.holder.bundle,
                "effective_ts": rival.effective_ts,
                "from_ts": rival.from_ts,
                "decided": rival.decided,
                "comparison": rival.comparison.export(),
            }
            for slot, rival in self._rivals.items()
        }
        return json.dumps(state, separators=(",", ":"))

    def load(self, text: str, partitions: Iterable[int]) -> None:
        """Go back to a committed state, with an empty pool; "" is the beginning.

        The `partitions` are waited for, whether or not something has come from them. The champion
        is watched once its record is followed again.
        """
        state: dict[str, Any] = json.loads(text) if text else {"settled_ts": -1}
        self._reset(partitions)
        self._champion = None
        self._rivals = {}
        self._settled_ts = state["settled_ts"]
        if champion := state.get("champion"):
            self._champion = ChampionWatch.of(self._settings, champion)
        for slot, s in state.get("rivals", {}).items():
            rival = self._new_rival(slot, s["bundle"], s["effective_ts"], s["from_ts"])
            rival.comparison.load(s["comparison"])
            rival.decided = s["decided"]
            self._rivals[slot] = rival
        if self._champion is not None and self._settled_ts >= self._champion.from_ts:
            begun = {r.holder for r in self._rivals.values() if r.comparison.get().bars}
            known = [h for h in self._awaited() if h.role != "challenger" or h in begun]
            for partition in self._newest:  # a transaction may be half read
                self._newest[partition] = dict.fromkeys(known, -1)

    def export(self, partition: int) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """What is pooled of one partition, and its symbols' own statistics, for its snapshot."""
        rows = self._pooled_rows()
        rows = rows[rows["partition"] == partition]
        own = [i for i, (p, _) in enumerate(self._symbols) if p == partition]
        names = [self._symbols[i][1] for i in own]
        place = np.zeros(len(self._symbols) + 1, np.int64)
        place[own] = np.arange(len(own))
        holders, holder = np.unique(rows["holder"], return_inverse=True)
        self._make_room()
        arrays = {name: np.ascontiguousarray(rows[name]) for name in ROW.names or ()}
        arrays["symbol"], arrays["holder"] = place[rows["symbol"]], holder.astype(np.int64)
        arrays["own"] = self._own[own]
        term = [self._champion.bundle, self._champion.from_ts] if self._champion else None
        return arrays, {
            "names": names,
            "holders": [list(self._holders[i]) for i in holders.tolist()],
            "term": term,
            "seen_ts": self._seen_ts.get(partition, self._settled_ts),
        }

    def load_partition(
        self,
        partition: int,
        arrays: Mapping[str, NDArray[Any]],
        meta: Mapping[str, Any],
        symbol_of: Callable[[str], int],
        holder_of: Callable[..., int],
    ) -> None:
        """Put back what `export` gave; what was settled meanwhile is weighed for its symbols only."""
        symbols = np.array([symbol_of(name) for name in meta["names"]], np.int64)
        holders = np.array([holder_of(*holder) for holder in meta["holders"]], np.int64)
        rows = np.zeros(len(arrays["ts"]), ROW)
        for name in ROW.names or ():
            rows[name] = arrays[name]
        rows["partition"] = partition
        if len(rows):
            rows["symbol"], rows["holder"] = symbols[rows["symbol"]], holders[rows["holder"]]
        self._make_room()
        held = self._champion
        if held is not None and meta["term"] == [held.bundle, held.from_ts]:
            self._own[symbols] = arrays["own"]
        self._seen_ts[partition] = meta["seen_ts"]
        self.add(rows)

    def _reset(self, partitions: Iterable[int]) -> None:
        self._pool = []
        self._newest = {partition: {} for partition in partitions}
        self._passed = {}
        self._seen_ts = dict.fromkeys(self._newest, -1)
        self._own = np.zeros((0, 4))
        self._rank = np.zeros(0, np.int64)

    # ---- columns ----

    def _pooled_rows(self) -> Rows:
        if len(self._pool) != 1:
            self._pool = [np.concatenate(self._pool) if self._pool else np.zeros(0, ROW)]
        return self._pool[0]

    def _seen(self, partitions: NDArray[np.int64]) -> NDArray[np.int64]:
        seen = np.full(max(self._newest) + 1, self._settled_ts)
        for partition, ts in self._seen_ts.items():
            seen[partition] = ts
        return seen[partitions]

    def _is_watched(self, symbols: NDArray[np.int64]) -> NDArray[np.bool_]:
        distinct, place = np.unique(symbols, return_inverse=True)
        named = np.array([self._symbols[i][1] in self._watch for i in distinct.tolist()], np.bool_)
        return named[place]

    def _ranks(self) -> NDArray[np.int64]:
        """Place of each symbol by name: sums must not depend on who came first."""
        if len(self._rank) != len(self._symbols):
            order = sorted(range(len(self._symbols)), key=lambda i: self._symbols[i])
            self._rank = np.empty(len(order), np.int64)
            self._rank[order] = np.arange(len(order))
        return self._rank

    def _of(self, rows: Rows, holders: Collection[Holder], from_ts: int) -> NDArray[np.bool_]:
        codes = [i for i, holder in enumerate(self._holders) if holder in holders]
        return np.isin(rows["holder"], codes) & (rows["ts"] >= from_ts)

    def _of_champion(self, rows: Rows) -> NDArray[np.bool_]:
        held = self._champion
        if held is None:
            return np.zeros(len(rows), np.bool_)
        return self._of(rows, _said_by_champion(held.bundle), held.from_ts)

    def _by_time(
        self, rows: Rows
    ) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
        """First row of each bar time and the end; mean difference and pooled z of each."""
        held = self._champion
        if not len(rows) or held is None or held.calibration is None:
            return np.zeros(1, np.intp), np.zeros(0), np.zeros(0)
        first = np.flatnonzero(np.diff(rows["ts"], prepend=-1, append=-1))
        counts = np.diff(first)
        differences = rows["loss"] - rows["reference_loss"]
        z = np.add.reduceat(held.calibration.standardise(differences), first[:-1]) / counts
        means = np.add.reduceat(differences, first[:-1]) / counts
        return first, means, held.calibration.pool(z, counts)

    def _gains(self, rows: Rows, rival: _Rival) -> dict[int, tuple[float, int]]:
        """By bar time: champion's less rival's mean loss on the symbols of both, and when known."""
        if self._champion is None or rival.decided:
            return {}
        ours, theirs = self._of_champion(rows), self._of(rows, [rival.holder], rival.from_ts)
        rows, is_theirs = rows[ours | theirs], theirs[ours | theirs]
        same = (np.diff(rows["ts"]) == 0) & (np.diff(rows["symbol"]) == 0)
        a = np.flatnonzero(same & (is_theirs[1:] != is_theirs[:-1]))
        if not len(a):
            return {}
        gains = np.where(is_theirs[a], -1.0, 1.0) * (rows["loss"][a] - rows["loss"][a + 1])
        matured = np.maximum(rows["matured_ts"][a], rows["matured_ts"][a + 1])
        ts = rows["ts"][a]
        first = np.flatnonzero(np.diff(ts, prepend=-1, append=-1))
        sums, newest = np.add.reduceat(gains, first[:-1]), np.maximum.reduceat(matured, first[:-1])
        pairs = zip((sums / np.diff(first)).tolist(), newest.tolist(), strict=True)
        return dict(zip(ts[first[:-1]].tolist(), pairs, strict=True))

    # ---- weighing ----

    def _hear(self, partition: int, rows: Rows) -> None:
        """Note up to where each holder has gone on, and forget who has fallen silent."""
        known = self._newest.setdefault(partition, {})
        for code in np.unique(rows["holder"]).tolist():
            holder = self._holders[code]
            own = rows["holder"] == code
            known[holder] = max(known.get(holder, -1), int(rows["ts"][own].max()))
            self._passed[partition, holder] = -int(np.count_nonzero(own))
        for holder in list(known):
            passed = self._passed.get((partition, holder), 0) + len(rows)
            self._passed[partition, holder] = passed
            if passed > PASSED_OVER_ROWS:
                del known[holder], self._passed[partition, holder]

    def _awaited(self) -> list[Holder]:
        """Who has a say: the champion and those who are compared with it."""
        held = self._champion
        if held is None:
            return []
        rivals = [rival.holder for rival in self._rivals.values() if not rival.decided]
        champion, beside = _said_by_champion(held.bundle)
        is_tested = any(holder.role == "champion" for holder in rivals)
        return [champion, *([beside] if is_tested else []), *rivals]

    def _complete_before(self, idle: Collection[int], whole: Collection[int]) -> int:
        awaited = self._awaited()

        def reached(partition: int) -> int:
            known = self._newest[partition]
            if partition not in whole and (waiting := [known[h] for h in awaited if h in known]):
                return min(waiting)
            return max(known.values(), default=-1)

        waited_for = [reached(partition) for partition in self._newest if partition not in idle]
        newest = (max(known.values(), default=-1) for known in self._newest.values())
        slowest = min(waited_for) if waited_for else max(newest, default=-1)
        return slowest - GRACE_BARS * self._interval_ms

    def _guilty(self) -> dict[str, float]:
        """Symbols whose own CUSUM is beyond chance, by excess loss since it left zero."""
        held = self._champion
        if held is None or held.calibration is None:
            return {}
        statistic, excess, bars, seen = self._own.T
        here = np.flatnonzero(seen)
        p_values = np.exp(-statistic[here] / held.calibration.scale_of_symbols)
        named = here[passing(p_values, FALSE_SYMBOLS) & (statistic[here] > 0)]
        means = excess[named] / bars[named]
        worst = sorted((-m, self._symbols[i][1]) for i, m in zip(named, means, strict=True))
        return {symbol: float(-mean) for mean, symbol in worst[:MOST_SYMBOLS]}

    def _weigh_symbols(self, rows: Rows) -> None:
        held = self._champion
        if held is None or held.calibration is None or not len(rows):
            return
        self._make_room()
        differences = rows["loss"] - rows["reference_loss"]
        z = held.calibration.standardise(differences)
        _accumulate(
            np.ascontiguousarray(rows["symbol"]), z, differences, held.calibration.slack, self._own
        )

    def _weigh_rival(self, slot: Slot, ts: int, gain: float, matured_ts: int) -> Decision | None:
        rival, champion = self._rivals[slot], self._champion
        if champion is None or rival.decided:
            return None
        if not rival.comparison.update(ts, matured_ts, gain):
            return None
        evidence = rival.comparison.get()
        if evidence.verdict == "continue" or (slot in ARM_SLOTS and evidence.verdict != "refuse"):
            return None
        if any(other.decided for other in self._rivals.values()):
            return (
                None  # the champion may be another one soon; if not, the next pair tells it again
            )
        rival.decided = True
        return Decision(slot, champion.bundle, rival.holder.bundle, ts, evidence)

    def _not_ahead(self, ts: int) -> Iterator[Decision]:
        """Rivals in shadow that make room, where an alarm lasts: the next has twice the bars to learn from.

        To refuse early can only lower the rate of false promotions.
        """
        assert self._champion is not None
        for slot, rival in self._rivals.items():
            evidence = rival.comparison.get()
            is_open = slot not in ARM_SLOTS and not rival.decided
            if is_open and evidence.pairs and evidence.mean_gain <= 0:
                rival.decided = True
                evidence = evidence._replace(verdict="refuse")
                yield Decision(slot, self._champion.bundle, rival.holder.bundle, ts, evidence)

    def _make_room(self) -> None:
        if len(self._own) < len(self._symbols):
            grown = np.zeros((2 * len(self._symbols), 4))
            grown[: len(self._own)] = self._own
            self._own = grown

    # ---- terms ----

    def _follow_champion(self, record: Lifecycle, calibration: Calibration | None) -> None:
        held = self._champion
        if record.bundle is None:
            self._champion = None
        elif held is not None and (held.bundle, held.from_ts) == _term(record):
            if held.calibration is None and calibration is not None:
                held.calibrate(calibration)
                for rival in self._rivals.values():
                    rival.comparison.least_scale = LEAST_SCALE * calibration.sd
                    rival.comparison.usual_scale = calibration.pair_sd
        else:
            probation = int(record.evidence.get("probation_bars", 0))
            self._champion = ChampionWatch(
                self._settings, record.bundle, record.effective_ts, record.parent, probation
            )
            if calibration is not None:
                self._champion.calibrate(calibration)
            self._own[:] = 0.0
            for slot, rival in self._rivals.items():  # they were compared with somebody else
                from_ts = max(rival.from_ts, record.effective_ts)
                self._rivals[slot] = self._new_rival(
                    slot, rival.holder.bundle, rival.effective_ts, from_ts
                )

    def _new_rival(
        self, slot: Slot, bundle: str, effective_ts: int, from_ts: int | None = None
    ) -> _Rival:
        settings = self._settings
        holder = Holder(bundle, "challenger")
        rule = Rule(alpha=level_of(settings, slot), max_bars=settings.max_shadow_bars)
        if slot in ARM_SLOTS:
            holder = Holder(bundle, "champion", ARM_OF[slot])
            rule = Rule(alpha=settings.alpha, max_bars=ENDLESS)
        calibration = self._champion and self._champion.calibration
        least = LEAST_SCALE * calibration.sd if calibration else 0.0
        usual = calibration.pair_sd if calibration else 0.0
        from_ts = effective_ts if from_ts is None else from_ts
        return _Rival(
            holder, effective_ts, from_ts, Comparison(rule, least, usual, self._pair_bars)
        )


def level_of(settings: MonitorSettings, slot: Slot) -> float:
    """Chance at most that the challenger of a slot is promoted though no better than the champion.

    Half of `alpha` for the first, which is most often alone, half of the rest for the next, and so on.
    """
    slots = challenger_slots(settings)
    halvings = min(slots.index(slot) + 1, len(slots) - 1) if slot in slots else len(slots) - 1
    return settings.alpha * 0.5**halvings


def challenger_slots(settings: MonitorSettings) -> tuple[Challenger, ...]:
    """The slots that may be filled: so many as are configured, and that of weights."""
    return (*CHALLENGERS[: settings.max_challengers], "weights")


def _said_by_champion(bundle: str) -> tuple[Holder, Holder]:
    """To be acted on, and beside another arm."""
    return Holder(bundle, "champion"), Holder(bundle, "control")


def _term(record: Lifecycle) -> tuple[str | None, int]:
    return record.bundle, record.effective_ts


@njit(cache=True)
def _accumulate(symbols, z, differences, slack, own):  # type: ignore[no-untyped-def]
    for i in range(len(symbols)):
        s = own[symbols[i]]
        s[0] = max(0.0, s[0] + z[i] - slack)
        if s[0] == 0.0:
            s[1], s[2] = 0.0, 0.0
        else:
            s[1] += differences[i]
            s[2] += 1.0
        s[3] += 1.0
