"""Predictions and labels find each other, in whatever order the two topics are read.

Of one series (symbol and target), labels come in the order of their bars, and so do the predictions
of each holder (bundle, role and arm): a join of ordered queues, compiled, with no object for any row.

The predictions of one target may be joined a second time, each with the next bar: what running losses
are made of (`models.running_loss`).
"""

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.baselines import CORRECTED, HALF_LIVES_BARS, Variances
from models.features import DUPLICATE, LATE, FeatureSpec
from models.targets import Labels, Target
from schemas.codecs import BarColumns, PredictionColumns
from schemas.messages import Arm, Role

STRAGGLERS = 65_536
"""A label is kept until so many more predictions of its partition were read: one transaction of
the inference worker writes all rows of one role and target, then those of the next."""
BARS_AT_ONCE = 64
"""Of one symbol: the reference of a bar must be looked up before newer bars push it out."""
MOST_LABELS = 1_000_000
"""Kept per partition at most, oldest dropped: no prediction has come for them."""

_STATUS = {DUPLICATE: "duplicate", LATE: "late", CORRECTED: "corrected"}
_NONE = -1

_SERIES = np.dtype(
    [("head", "i8"), ("tail", "i8"), ("dropped", "i8"), ("kept", "i8"), ("lane", "i8")]
)
"""The queue of labels, how many were dropped from it so far, and the first of its lanes."""
_LABEL_VARIANCES = ("log_variances", "f8", (len(HALF_LIVES_BARS),))
_LABEL = np.dtype(
    [
        ("next", "i8"),
        ("ts", "i8"),
        ("matured_ts", "i8"),
        ("label", "f8"),
        _LABEL_VARIANCES,
        ("live", "?"),
    ],
    align=True,
)
_LANE = np.dtype(
    [
        ("next", "i8"),
        ("holder", "i8"),
        ("head", "i8"),
        ("tail", "i8"),
        ("last_ts", "i8"),
        ("passed", "i8"),
        ("passed_at", "i8"),
    ]
)
"""Predictions of one holder that wait, the newest there was, and the last label they went past."""
_WAITING = np.dtype([("next", "i8"), ("ts", "i8"), ("value", "f8"), ("live", "?")], align=True)

_OUTCOME = np.dtype(
    [
        ("slot", "i8"),
        ("target", "i8"),
        ("holder", "i8"),
        ("ts", "i8"),
        ("matured_ts", "i8"),
        ("value", "f8"),
        ("label", "f8"),
        _LABEL_VARIANCES,
        ("live", "?"),
    ],
    align=True,
)
"""A prediction joined with its label: `slot`, `target` and `holder` are places in the join's lists,
`log_variances` those of `models.baselines.Variances` at the prediction's bar, `live` says whether
one of the two messages that make it was live: only then it is news. `target` one past the last is
the second join: its `label` is the squared return to the next bar, that of `matured_ts`."""

_KEY, _KEY_OF_LANE = (
    [("series", "i8"), ("ts", "i8")],
    [("series", "i8"), ("holder", "i8"), ("ts", "i8")],
)
_QUEUES = {
    "kept": np.dtype([*_KEY, ("matured_ts", "i8"), ("label", "f8"), _LABEL_VARIANCES]),
    "lanes": np.dtype(_KEY_OF_LANE),
    "waiting": np.dtype([*_KEY_OF_LANE, ("value", "f8")]),
}
"""The queues in a snapshot; `series` counts the partition's own, `ts` of a lane is its newest."""

Outcomes = NDArray[np.void]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Holder(NamedTuple):
    """Who made a prediction."""

    bundle: str
    role: Role
    arm: Arm = "a"


class _Pool:
    """Records addressed by number; those that are free are a list through their `next`."""

    def __init__(self, layout: np.dtype[np.void]) -> None:
        self.at: NDArray[np.void] = np.zeros(0, layout)
        self.spare = np.array([_NONE, 0])
        """First free record, and how many there are."""

    def make_room(self, n: int) -> None:
        if self.spare[1] >= n:
            return
        old = len(self.at)
        grown = np.zeros(max(1024, 2 * old, old + n), self.at.dtype)
        grown[:old] = self.at
        grown["next"][old:] = np.append(np.arange(old + 1, len(grown)), self.spare[0])
        self.at, self.spare = grown, np.array([old, self.spare[1] + len(grown) - old])


@dataclass
class _Partition:
    slots: dict[str, int] = field(default_factory=dict)
    read: int = 0
    """Predictions read."""
    newest_ts: int = -1
    """Event time of the newest prediction."""
    marks: deque[tuple[int, int]] = field(default_factory=deque)
    """(read, newest_ts) after past batches."""


class _State(NamedTuple):
    """What the compiled functions work on."""

    series: NDArray[np.void]
    labels: NDArray[np.void]
    spare_labels: Ints
    lanes: NDArray[np.void]
    spare_lanes: Ints
    waiting: NDArray[np.void]
    spare_waiting: Ints


class Join:
    """State of all partitions that this process has; pure, no Kafka in it."""

    def __init__(
        self, spec: FeatureSpec, targets: Sequence[Target], running: Target | None = None
    ) -> None:
        """`running`: the target whose predictions are joined with the next bar too."""
        self.spec, self.targets, self.running = spec, tuple(targets), running
        self._n_series = len(self.targets) + (running is not None)
        """Of each symbol."""
        self.dropped: Counter[str] = Counter()
        """Messages of which nothing came, by why."""
        self.symbols: list[tuple[int, str]] = []
        """(partition, name) by slot."""
        self.holders: list[Holder] = []
        """By code; they are few and stay."""
        self._codes = {target.name: k for k, target in enumerate(self.targets)}
        self._holder_codes: dict[tuple[str, Role, Arm], int] = {}
        self._series: NDArray[np.void] = np.zeros(0, _SERIES)
        self._kept, self._lanes, self._waiting = _Pool(_LABEL), _Pool(_LANE), _Pool(_WAITING)
        self._labels = Labels(self.targets, spec, next_steps=int(running is not None))
        depth = 2 * max(target.horizon for target in self.targets) + 64 + BARS_AT_ONCE
        self._variances = Variances(spec, depth)
        self._free: list[int] = []
        self._partitions: dict[int, _Partition] = {}

    def take_bars(self, bars: BarColumns, partitions: Ints, live: Bools) -> Outcomes:
        """Bars in the order of their partition; `live` False where state is rebuilt in silence."""
        slots = self._slots_of(partitions, bars.symbols)
        found = [np.zeros(0, _OUTCOME)]
        for rows in _pieces(slots, live):
            status = self._variances.update(slots[rows], bars.ts[rows], bars.ohlcv[rows, 3])
            for code, name in _STATUS.items():
                if n := int(np.count_nonzero(status == code)):
                    self.dropped[name] += n
            matured = self._labels.update(slots[rows], bars.ts[rows], bars.ohlcv[rows])
            if not len(matured):
                continue
            series = matured.slot * self._n_series + matured.target
            self._kept.make_room(len(matured))
            state = self._state()
            out = np.empty(_lanes_in(state, series), _OUTCOME)
            n, unlabelled = _take_labels(
                state,
                series,
                self._n_series,
                len(self.targets),
                matured.ts,
                matured.matured_ts,
                matured.label,
                self._variances.at(matured.slot, matured.ts),
                bool(live[rows[0]]),
                out,
            )
            self._count("unlabelled", unlabelled)
            found.append(out[:n])
        for partition in np.unique(partitions).tolist():
            self._forget_labels(self._partitions[partition])
        return np.concatenate(found, dtype=_OUTCOME)

    def take_predictions(
        self, predictions: PredictionColumns, partitions: Ints, live: Bools
    ) -> Outcomes:
        """Predictions, those of one symbol, target, bundle and role in the order of their bars.

        One that is not newer than the newest of these is a repeated one.
        """
        n = len(predictions)
        slots = self._slots_of(partitions, predictions.symbols)
        unknown = repeat(_NONE)
        target = np.fromiter(map(self._codes.get, predictions.targets, unknown), np.int64, n)
        holder = self._holders_of(
            list(zip(predictions.bundles, predictions.roles, predictions.arms, strict=True))
        )
        ts = np.array(predictions.ts, np.int64)
        values = np.array(predictions.values, np.float64)
        outcomes, repeated, unlabelled = self._take(slots, target, holder, ts, values, live)
        self._count("unknown_target", int(np.count_nonzero(target < 0)))
        self._count("repeated", repeated)
        self._count("unlabelled", unlabelled)
        if self.running is not None:
            own = np.flatnonzero(target == self.targets.index(self.running))
            of_steps = np.full(len(own), len(self.targets))
            steps, _, _ = self._take(
                slots[own], of_steps, holder[own], ts[own], values[own], live[own]
            )
            outcomes = np.concatenate([outcomes, steps])
        for partition in np.unique(partitions).tolist():
            here = partitions == partition
            state = self._partitions[partition]
            state.read += int(np.count_nonzero(here))
            state.newest_ts = max(state.newest_ts, int(ts[here].max()))
            self._forget_labels(state)
        return outcomes

    def _take(
        self, slots: Ints, target: Ints, holder: Ints, ts: Ints, values: Floats, live: Bools
    ) -> tuple[Outcomes, int, int]:
        self._lanes.make_room(len(slots))
        self._waiting.make_room(len(slots))
        out = np.empty(len(slots), _OUTCOME)
        state, n_series = self._state(), self._n_series
        n, repeated, unlabelled = _take_predictions(
            state, slots, target, n_series, holder, ts, values, live, out
        )
        return out[:n], repeated, unlabelled

    def waiting(self) -> int:
        """Predictions whose label is to come, and of the second join those whose next bar is."""
        return len(self._waiting.at) - int(self._waiting.spare[1])

    def drop(self, partition: int) -> None:
        """Forget a partition; its symbols' slots are free again."""
        state = self._partitions.pop(partition, None)
        if state is None or not state.slots:
            return
        slots = np.array(list(state.slots.values()), np.int64)
        self._labels.reset(slots)
        self._variances.reset(slots)
        _clear(self._state(), self._series_of(slots))
        self._free += slots.tolist()

    def export(self, partition: int) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and JSON-able meta of one partition: what `load` takes."""
        state = self._partition(partition)
        slots = np.array(list(state.slots.values()), np.int64)
        arrays = {f"labels/{n}": a for n, a in self._labels.export(slots).items()}
        arrays |= {f"variances/{n}": a for n, a in self._variances.export(slots).items()}
        inside, series = self._state(), self._series_of(slots)
        queues = [
            np.empty(n, layout)
            for n, layout in zip(_sizes(inside, series), _QUEUES.values(), strict=True)
        ]
        _export(inside, series, *queues)
        for queue, rows in zip(_QUEUES, queues, strict=True):
            arrays |= {
                f"{queue}/{n}": np.ascontiguousarray(rows[n]) for n in rows.dtype.names or ()
            }
        meta = {
            "symbols": list(state.slots),
            "holders": self.holders,
            "newest_ts": state.newest_ts,
            "fits": self._fits(),
        }
        return arrays, meta

    def fits(self, meta: Mapping[str, Any]) -> bool:
        """Whether a snapshot is of these targets and this market."""
        return meta.get("fits") == self._fits()

    def load(
        self, partition: int, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
    ) -> None:
        """Put a partition back as it was; everything in it counts as published already."""
        self.drop(partition)
        symbols = meta["symbols"]
        slots = self._slots_of(np.full(len(symbols), partition), symbols)
        self._labels.load(slots, under("labels/", arrays))
        self._variances.load(slots, under("variances/", arrays))
        self._partition(partition).newest_ts = meta["newest_ts"]
        holders = self._holders_of([Holder(*holder) for holder in meta["holders"]])
        series = self._series_of(slots)
        kept, lanes, waiting = (under(f"{n}/", arrays) for n in ("kept", "lanes", "waiting"))
        self._kept.make_room(len(kept["ts"]))
        self._lanes.make_room(len(lanes["series"]))
        self._waiting.make_room(len(waiting["ts"]))
        _load(
            self._state(),
            series[kept["series"]],
            kept["ts"],
            kept["matured_ts"],
            kept["label"],
            kept["log_variances"],
            series[lanes["series"]],
            holders[lanes["holder"]],
            lanes["ts"],
            series[waiting["series"]],
            holders[waiting["holder"]],
            waiting["ts"],
            waiting["value"],
        )

    def slot_of(self, partition: int, symbol: str) -> int:
        """The slot of a symbol, which gets one where it has none."""
        slot = self._partition(partition).slots.get(symbol)
        return self._add(partition, symbol) if slot is None else slot

    def holder_of(self, bundle: str, role: Role, arm: Arm = "a") -> int:
        """The code of a holder, which gets one where it has none."""
        holder = Holder(bundle, role, arm)
        code = self._holder_codes.setdefault(holder, len(self.holders))
        if code == len(self.holders):
            self.holders.append(holder)
        return code

    def _state(self) -> _State:
        kept, lanes, waiting = self._kept, self._lanes, self._waiting
        return _State(
            self._series, kept.at, kept.spare, lanes.at, lanes.spare, waiting.at, waiting.spare
        )

    def _count(self, reason: str, n: int) -> None:
        if n:
            self.dropped[reason] += n

    def _forget_labels(self, state: _Partition) -> None:
        """Drop labels that were passed by the predictions at least STRAGGLERS predictions ago."""
        marks = state.marks
        if not marks or state.read > marks[-1][0]:
            marks.append((state.read, state.newest_ts))
        while len(marks) > 1 and marks[1][0] <= state.read - STRAGGLERS:
            marks.popleft()
        settled_ts = marks[0][1] if marks[0][0] <= state.read - STRAGGLERS else -1
        series = self._series_of(np.array(list(state.slots.values()), np.int64))
        _forget(self._state(), series, settled_ts, max(MOST_LABELS // max(len(series), 1), 1))

    def _series_of(self, slots: Ints) -> Ints:
        k = self._n_series
        return (slots[:, None] * k + np.arange(k)).ravel()

    def _slots_of(self, partitions: Ints, symbols: Sequence[str]) -> Ints:
        if not len(symbols):
            return np.zeros(0, np.int64)
        present = np.unique(partitions).tolist()
        if len(present) == 1:
            return self._slots_within(present[0], symbols)
        slots = np.empty(len(symbols), np.int64)
        names = np.array(symbols, object)
        for partition in present:
            here = partitions == partition
            slots[here] = self._slots_within(partition, names[here].tolist())
        return slots

    def _slots_within(self, partition: int, symbols: Sequence[str]) -> Ints:
        known = self._partition(partition).slots
        try:
            return np.fromiter(map(known.__getitem__, symbols), np.int64, len(symbols))
        except KeyError:
            for symbol in dict.fromkeys(symbols):
                self.slot_of(partition, symbol)
            return np.array([known[symbol] for symbol in symbols], np.int64)

    def _holders_of(self, holders: Sequence[tuple[str, Role, Arm]]) -> Ints:
        known = self._holder_codes
        try:
            return np.fromiter(map(known.__getitem__, holders), np.int64, len(holders))
        except KeyError:
            return np.array([self.holder_of(*holder) for holder in holders], np.int64)

    def _add(self, partition: int, symbol: str) -> int:
        if self._free:
            slot = self._free.pop()
            self.symbols[slot] = partition, symbol
        else:
            slot = len(self.symbols)
            self.symbols.append((partition, symbol))
            if slot >= self._labels.capacity:
                capacity = max(64, 2 * slot)
                self._labels.grow(capacity)
                self._variances.grow(capacity)
                series = np.zeros(capacity * self._n_series, _SERIES)
                series[: len(self._series)] = self._series
                self._series = series
        own = slice(slot * self._n_series, (slot + 1) * self._n_series)
        self._series[own] = (_NONE, _NONE, 0, 0, _NONE)
        self._partition(partition).slots[symbol] = slot
        return slot

    def _partition(self, partition: int) -> _Partition:
        return self._partitions.setdefault(partition, _Partition())

    def _fits(self) -> dict[str, Any]:
        return {
            "layout": 3,
            "spec": self.spec.model_dump(mode="json"),
            "targets": [target.model_dump(mode="json") for target in self.targets],
            "running": self.running and self.running.name,
        }


def _pieces(slots: Ints, live: Bools) -> Iterator[NDArray[np.intp]]:
    """Rows in pieces that hold at most BARS_AT_ONCE of each slot, a slot's rows in their order.

    A piece is replayed or live; what is replayed comes first.
    """
    for some in (np.flatnonzero(~live), np.flatnonzero(live)):
        own = slots[some]
        if not len(own):
            continue
        if np.bincount(own).max() <= BARS_AT_ONCE:
            yield some
            continue
        order = np.argsort(own, kind="stable")
        first = np.flatnonzero(np.diff(own[order], prepend=-1))
        rank = np.empty(len(own), np.intp)
        rank[order] = np.arange(len(own)) - np.repeat(first, np.diff(first, append=len(own)))
        for turn in range(int(rank.max()) // BARS_AT_ONCE + 1):
            yield some[rank // BARS_AT_ONCE == turn]


def under(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays of one part of a snapshot, by their own names."""
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


# ---- compiled ----


@njit(cache=True)
def _taken(pool, spare):  # type: ignore[no-untyped-def]
    place = spare[0]
    spare[0] = pool[place].next
    spare[1] -= 1
    pool[place].next = _NONE
    return place


@njit(cache=True)
def _given_back(pool, spare, place):  # type: ignore[no-untyped-def]
    pool[place].next = spare[0]
    spare[0] = place
    spare[1] += 1


@njit(cache=True)
def _lane_of(state, series, holder):  # type: ignore[no-untyped-def]
    """The lane of a holder, made where there is none."""
    place = state.series[series].lane
    while place != _NONE and state.lanes[place].holder != holder:
        place = state.lanes[place].next
    if place == _NONE:
        place = _taken(state.lanes, state.spare_lanes)
        lane = state.lanes[place]
        lane.next = state.series[series].lane
        lane.holder, lane.head, lane.tail = holder, _NONE, _NONE
        lane.last_ts, lane.passed, lane.passed_at = -1, _NONE, -1
        state.series[series].lane = place
    return place


@njit(cache=True)
def _wait(state, place, ts, value, live):  # type: ignore[no-untyped-def]
    lane = state.lanes[place]
    at = _taken(state.waiting, state.spare_waiting)
    row = state.waiting[at]
    row.ts, row.value, row.live = ts, value, live
    if lane.head == _NONE:
        lane.head = at
    else:
        state.waiting[lane.tail].next = at
    lane.tail = at
    lane.last_ts = max(lane.last_ts, ts)


@njit(cache=True)
def _keep(state, series, ts, matured_ts, label, log_variances, live):  # type: ignore[no-untyped-def]
    s = state.series[series]
    at = _taken(state.labels, state.spare_labels)
    row = state.labels[at]
    row.ts, row.matured_ts, row.label, row.live = ts, matured_ts, label, live
    row.log_variances[:] = log_variances
    if s.head == _NONE:
        s.head = at
    else:
        state.labels[s.tail].next = at
    s.tail = at
    s.kept += 1


@njit(cache=True)
def _join_lane(state, series, place, n_series, out, n):  # type: ignore[no-untyped-def]
    """Join what waits in a lane as far as labels have come; returns (outcomes so far, given up)."""
    s, lane = state.series[series], state.lanes[place]
    unlabelled = 0
    while lane.head != _NONE:
        prediction = state.waiting[lane.head]
        known = lane.passed != _NONE and lane.passed_at >= s.dropped
        following = state.labels[lane.passed].next if known else s.head
        at = lane.passed_at + 1 if known else s.dropped
        while following != _NONE and state.labels[following].ts < prediction.ts:
            lane.passed, lane.passed_at = following, at
            following = state.labels[following].next
            at += 1
        if following == _NONE:
            break
        label = state.labels[following]
        if label.ts == prediction.ts:
            o = out[n]
            o.slot, o.target, o.holder = series // n_series, series % n_series, lane.holder
            o.ts, o.matured_ts = label.ts, label.matured_ts
            o.value, o.label, o.live = prediction.value, label.label, prediction.live or label.live
            o.log_variances[:] = label.log_variances
            n += 1
            lane.passed, lane.passed_at = following, at
        else:  # passed over: its label will never come
            unlabelled += 1
        first = lane.head
        lane.head = prediction.next
        _given_back(state.waiting, state.spare_waiting, first)
    return n, unlabelled


@njit(cache=True)
def _take_predictions(state, slot, target, n_series, holder, ts, value, live, out):  # type: ignore[no-untyped-def]
    n, repeated, unlabelled = 0, 0, 0
    for i in range(slot.size):
        if target[i] < 0:
            continue
        series = slot[i] * n_series + target[i]
        place = _lane_of(state, series, holder[i])
        if ts[i] <= state.lanes[place].last_ts:
            repeated += 1
            continue
        _wait(state, place, ts[i], value[i], live[i])
        n, given_up = _join_lane(state, series, place, n_series, out, n)
        unlabelled += given_up
    return n, repeated, unlabelled


@njit(cache=True)
def _lanes_in(state, series):  # type: ignore[no-untyped-def]
    """Outcomes at most of one label for each of `series`."""
    n = 0
    for k in series:
        place = state.series[k].lane
        while place != _NONE:
            n += 1
            place = state.lanes[place].next
    return n


@njit(cache=True)
def _take_labels(  # type: ignore[no-untyped-def]
    state, series, n_series, n_targets, ts, matured_ts, label, log_variances, live, out
):
    n, unlabelled = 0, 0
    for i in range(series.size):
        _keep(state, series[i], ts[i], matured_ts[i], label[i], log_variances[i], live)
        place = state.series[series[i]].lane
        while place != _NONE:
            n, given_up = _join_lane(state, series[i], place, n_series, out, n)
            if series[i] % n_series < n_targets:
                unlabelled += given_up
            place = state.lanes[place].next
    return n, unlabelled


@njit(cache=True)
def _forget(state, series, settled_ts, most):  # type: ignore[no-untyped-def]
    """Drop labels up to `settled_ts` and beyond `most`, and lanes that ended before them."""
    for k in series:
        s = state.series[k]
        while s.head != _NONE and (state.labels[s.head].ts <= settled_ts or s.kept > most):
            first = s.head
            s.head = state.labels[first].next
            s.dropped += 1
            s.kept -= 1
            _given_back(state.labels, state.spare_labels, first)
        place, before = s.lane, _NONE
        while place != _NONE:
            following = state.lanes[place].next
            if state.lanes[place].head == _NONE and state.lanes[place].last_ts < settled_ts:
                if before == _NONE:
                    s.lane = following
                else:
                    state.lanes[before].next = following
                _given_back(state.lanes, state.spare_lanes, place)
            else:
                before = place
            place = following


@njit(cache=True)
def _clear(state, series):  # type: ignore[no-untyped-def]
    for k in series:
        s = state.series[k]
        while s.head != _NONE:
            first = s.head
            s.head = state.labels[first].next
            _given_back(state.labels, state.spare_labels, first)
        while s.lane != _NONE:
            place = s.lane
            while state.lanes[place].head != _NONE:
                first = state.lanes[place].head
                state.lanes[place].head = state.waiting[first].next
                _given_back(state.waiting, state.spare_waiting, first)
            s.lane = state.lanes[place].next
            _given_back(state.lanes, state.spare_lanes, place)


@njit(cache=True)
def _sizes(state, series):  # type: ignore[no-untyped-def]
    labels, lanes, waiting = 0, 0, 0
    for k in series:
        labels += state.series[k].kept
        place = state.series[k].lane
        while place != _NONE:
            lanes += 1
            at = state.lanes[place].head
            while at != _NONE:
                waiting += 1
                at = state.waiting[at].next
            place = state.lanes[place].next
    return labels, lanes, waiting


@njit(cache=True)
def _export(state, series, kept, lanes, waiting):  # type: ignore[no-untyped-def]
    labels_done, lanes_done, waiting_done = 0, 0, 0
    for i in range(series.size):
        at = state.series[series[i]].head
        while at != _NONE:
            label, row = state.labels[at], kept[labels_done]
            row.series, row.ts, row.matured_ts, row.label = (
                i,
                label.ts,
                label.matured_ts,
                label.label,
            )
            row.log_variances[:] = label.log_variances
            labels_done += 1
            at = label.next
        place = state.series[series[i]].lane
        while place != _NONE:
            lane, end = state.lanes[place], lanes[lanes_done]
            end.series, end.holder, end.ts = i, lane.holder, lane.last_ts
            lanes_done += 1
            at = lane.head
            while at != _NONE:
                prediction, one = state.waiting[at], waiting[waiting_done]
                one.series, one.holder, one.ts = i, lane.holder, prediction.ts
                one.value = prediction.value
                waiting_done += 1
                at = prediction.next
            place = lane.next


@njit(cache=True)
def _load(  # type: ignore[no-untyped-def]
    state,
    kept_series,
    kept_ts,
    matured_ts,
    label,
    log_variances,
    lane_series,
    lane_holder,
    lane_ts,
    series,
    holder,
    ts,
    value,
):
    for i in range(kept_series.size):
        _keep(state, kept_series[i], kept_ts[i], matured_ts[i], label[i], log_variances[i], False)
    for i in range(lane_series.size):
        state.lanes[_lane_of(state, lane_series[i], lane_holder[i])].last_ts = lane_ts[i]
    for i in range(series.size):
        _wait(state, _lane_of(state, series[i], holder[i]), ts[i], value[i], False)
