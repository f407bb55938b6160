"""Per-symbol state and one batched step for every symbol that has a new bar; no Kafka in it.

Shapes: n bars of a batch, S symbol slots, R bars of remembered features, F features, K targets,
T steps of attention, k heaviest of them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.bundle import Bundle, BundleRejected
from models.features import FEATURE_NAMES, RESET, STATE, WARM_UP_BARS, Features, FeatureSpec
from models.runtimes import Runtime, Step
from schemas.codecs import BarColumns
from schemas.messages import ARM_OF, ARM_SLOTS, CHALLENGERS, Arm, Role
from workers.schedule import Schedule

Rows = NDArray[np.intp]
Groups = list[tuple[int, Rows]]
"""Which rows of a batch are of which partition, in their order."""


class Attention(NamedTuple):
    """Where the network looked, for m forecasts: heaviest steps first."""

    lags: NDArray[np.int64]  # [m, k] bars back, 0 = the bar itself
    ts: NDArray[np.int64]  # [m, k] open times of those bars
    weights: NDArray[np.float32]  # [m, k]
    entropy: NDArray[np.float32]  # [m] nats


class Forecast(NamedTuple):
    """What one bundle in one role says about m bars of a batch."""

    bundle: Bundle
    role: Role
    rows: Rows  # [m] places in the batch
    values: NDArray[np.float64]  # [m, K]
    probabilities: Mapping[int, NDArray[np.float64]]  # target index -> [m, classes]
    attention: Attention
    arm: Arm = "a"


class Processed(NamedTuple):
    """The fate of the bars that were taken: the first of the batch, as many as `status` is long."""

    status: NDArray[np.int8]
    """As `models.features` counts it."""
    forecasts: list[Forecast]


@dataclass
class _Model:
    """A bundle that runs: `joined[slot]` says whether it carries state for that symbol."""

    runtime: Runtime
    joined: NDArray[np.bool_]

    @property
    def bundle(self) -> Bundle:
        return self.runtime.bundle


class Engine:
    """The state of all symbols of all partitions that this replica holds.

    Every symbol lives in a slot; all state is arrays indexed by slot. A bundle that takes a role
    joins each symbol at its first bar under the schedule: its state is rebuilt from zero over the
    last R feature rows, never carried over from other weights. So that this makes no batch much
    longer, `process` takes no more bars than lead to `rebuilt_rows` of rebuilding.
    """

    def __init__(
        self,
        spec: FeatureSpec,
        remembered_bars: int,
        attention_top: int = 5,
        rebuilt_rows: float = math.inf,
    ) -> None:
        self.spec = spec
        self.remembered_bars = remembered_bars
        self.attention_top = attention_top
        self.rebuilt_rows = rebuilt_rows
        self.schedules: dict[int, Schedule] = {}
        self._features = Features(spec)
        self._models: dict[str, _Model] = {}
        self._slots: dict[int, dict[str, int]] = {}
        self._free: list[int] = []
        self._seen = np.zeros(0, np.int64)
        self._past_x = np.zeros((0, remembered_bars, len(FEATURE_NAMES)), np.float32)
        self._past_ts = np.zeros((0, remembered_bars), np.int64)
        self._next = np.zeros(0, np.int64)
        none = np.zeros(0, np.int64)  # compiled here, not when the first bars have come
        _remember(self._past_x, self._past_ts, self._next, none, self._past_x[:, 0], none)
        self._attention(none, none, np.zeros((0, 1), np.float32))

    @property
    def capacity(self) -> int:
        return len(self._seen)

    @property
    def bundles(self) -> dict[str, Bundle]:
        """The bundles that are loaded, by version."""
        return {version: model.bundle for version, model in self._models.items()}

    def symbols(self, partition: int) -> list[str]:
        return list(self._slots.get(partition, ()))

    def add(self, runtime: Runtime) -> None:
        """Load a bundle; it runs where and when a schedule gives it a role.

        Raises BundleRejected if it reads bars otherwise than the bundles that run.
        """
        config = runtime.bundle.config
        if config.features != self.spec:
            raise BundleRejected(
                f"{runtime.bundle.version}: its feature spec {config.features} is not the running "
                f"{self.spec}; restart the replicas with it as the champion"
            )
        if config.window > self.remembered_bars:
            raise BundleRejected(
                f"{runtime.bundle.version}: attends to {config.window} bars, "
                f"{self.remembered_bars} are remembered; restart with it as the champion"
            )
        runtime.grow(self.capacity)
        self._models[runtime.bundle.version] = _Model(runtime, np.zeros(self.capacity, np.bool_))

    def remove(self, version: str) -> None:
        del self._models[version]

    def process(self, bars: BarColumns, partitions: NDArray[np.int64]) -> Processed:
        """Take bars in order (several of one symbol are welcome) and forecast from each.

        `partitions` i64[n] says where each of the n bars came from. All are taken, or the first of
        them, at least one, if some bundle must be rebuilt for many symbols: give the rest again.
        What is said does not depend on it. Duplicates and late bars change nothing and have no
        forecast; nor have bars of a symbol that is still warming up.
        """
        groups = _by_partition(partitions)
        slots = self._slots_of(bars.symbols, groups)
        roles = self._roles(bars, groups)
        taken = slice(0, self._affordable(slots, roles))
        slots, ts = slots[taken], bars.ts[taken]
        x, status = self._features.update(slots, ts, bars.ohlcv[taken])
        codes = {version: _codes_in(role_of) for version, role_of in roles.items()}
        is_contested = any(_CONTROL in found for found in codes.values())
        parts: dict[tuple[str, int], list[tuple[Any, ...]]] = {}
        for rows in _rounds(slots, (status <= RESET).nonzero()[0]):
            at = slots[rows]
            self._start_anew(at[status[rows] == RESET])
            self._seen[at] += 1
            ready = self._seen[at] > WARM_UP_BARS
            if not ready.all():
                rows, at = rows[ready], at[ready]
            if not len(rows):
                continue
            now_x, now_ts = x[rows], ts[rows]
            told: list[_Told] = []
            for version, role_of in roles.items():
                model, role = self._models[version], role_of[rows]
                self._join(model, at, role)
                runs = (role != _NONE).nonzero()[0]
                if not len(runs):
                    continue
                every = len(runs) == len(rows)
                where = at if every else at[runs]
                step = model.runtime.step(where, now_x if every else now_x[runs])
                warm = model.runtime.steps_seen[where] >= model.bundle.config.warm_up_bars
                told.append(_Told(version, runs, where, np.where(warm, role[runs], _NONE), step))
            if is_contested:
                _stand_in(told, len(rows))
            for version, runs, where, role, step in told:
                for code in codes[version]:
                    said = (role == code).nonzero()[0]
                    if len(said):
                        parts.setdefault((version, code), []).append(
                            (
                                rows[runs[said]],
                                step.values[said],
                                {k: p[said] for k, p in step.probabilities.items()},
                                self._attention(
                                    where[said], now_ts[runs[said]], step.weights[said]
                                ),
                            )
                        )
            _remember(self._past_x, self._past_ts, self._next, at, now_x, now_ts)
        for partition, rows in groups:
            if rows[0] < len(ts):
                schedule = self.schedules.setdefault(partition, Schedule())
                newest_ts = int(ts[rows[rows < len(ts)]].max())
                schedule.newest_ts = max(schedule.newest_ts, newest_ts)
        forecasts = [
            _joined_parts(self._models[version].bundle, code, pieces)
            for (version, code), pieces in parts.items()
        ]
        return Processed(status, forecasts)

    def take_tally(self) -> dict[str, int]:
        """What lay between bars since the last call, as `Features.take_tally` counts it."""
        return self._features.take_tally()

    def silent(self, partition: int) -> int:
        """Symbols that have had no bar for so long that their next one starts them anew."""
        slots = np.array(list(self._slots.get(partition, {}).values()), np.int64)
        newest_ts = self.schedules.get(partition, Schedule()).newest_ts
        return int((newest_ts - self._features.last_ts[slots] > self.spec.reset_after_ms).sum())

    def export(self, partition: int) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Copy one partition's state: arrays by name, and what is not an array as JSON values."""
        slots = np.array(list(self._slots.get(partition, {}).values()), np.int64)
        arrays: dict[str, NDArray[Any]] = {
            "seen": self._seen[slots],
            "past_x": self._past_x[slots],
            "past_ts": self._past_ts[slots],
            "next": self._next[slots],
        }
        arrays |= _prefixed("features", self._features.export(slots))
        for version, model in self._models.items():
            arrays[f"joined/{version}"] = model.joined[slots]
            arrays |= _prefixed(f"model/{version}", model.runtime.export(slots))
        meta = {
            "symbols": self.symbols(partition),
            "schedule": self.schedules.get(partition, Schedule()).to_json(),
            "spec": self.spec.model_dump(mode="json"),
            "features": list(FEATURE_NAMES),
            "layout": _LAYOUT,
            "remembered_bars": self.remembered_bars,
        }
        return arrays, meta

    def fits(self, meta: Mapping[str, Any]) -> bool:
        """Whether exported state can be loaded into this engine."""
        return bool(
            meta["spec"] == self.spec.model_dump(mode="json")
            and meta["features"] == list(FEATURE_NAMES)
            and meta.get("layout") == _LAYOUT
            and meta["remembered_bars"] == self.remembered_bars
        )

    def load(
        self, partition: int, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
    ) -> None:
        """Put back what `export` gave; bundles that are not loaded are passed over."""
        self.drop(partition)
        symbols = meta["symbols"]
        self.make_room(len(symbols))
        slots = self._slots_of(symbols, [(partition, np.arange(len(symbols)))])
        self._seen[slots] = arrays["seen"]
        self._past_x[slots] = arrays["past_x"]
        self._past_ts[slots] = arrays["past_ts"]
        self._next[slots] = arrays["next"]
        self._features.load(slots, _unprefixed("features", arrays))
        for version, model in self._models.items():
            if f"joined/{version}" in arrays:
                model.joined[slots] = arrays[f"joined/{version}"]
                model.runtime.load(slots, _unprefixed(f"model/{version}", arrays))
        self.schedules[partition] = Schedule.from_json(meta["schedule"])

    def make_room(self, symbols: int) -> None:
        """For so many more at once: to grow several times is to copy all state several times."""
        if (missing := symbols - len(self._free)) > 0:
            self._grow(max(self.capacity + missing, 2 * self.capacity))

    def drop(self, partition: int) -> None:
        """Forget a partition: its symbols' slots are free again."""
        slots = np.array(list(self._slots.pop(partition, {}).values()), np.int64)
        self._features.reset(slots)
        self._start_anew(slots)
        for model in self._models.values():
            model.joined[slots] = False
        self._free += slots.tolist()
        self.schedules.pop(partition, None)

    def _slots_of(self, symbols: list[str], groups: Groups) -> NDArray[np.int64]:
        slots = np.empty(len(symbols), np.int64)
        for partition, rows in groups:
            table = self._slots.setdefault(partition, {})
            here = symbols if len(rows) == len(symbols) else [symbols[row] for row in rows.tolist()]
            try:
                slots[rows] = [table[symbol] for symbol in here]
            except KeyError:
                slots[rows] = [self._slot_of(table, symbol) for symbol in here]
        return slots

    def _slot_of(self, table: dict[str, int], symbol: str) -> int:
        slot = table.get(symbol)
        if slot is None:
            if not self._free:
                self._grow(max(64, 2 * self.capacity))
            slot = table[symbol] = self._free.pop()
        return slot

    def _grow(self, capacity: int) -> None:
        more = capacity - self.capacity
        self._free += range(capacity - 1, self.capacity - 1, -1)
        self._seen = _longer(self._seen, more)
        self._past_x = _longer(self._past_x, more)
        self._past_ts = _longer(self._past_ts, more)
        self._next = _longer(self._next, more)
        self._features.grow(capacity)
        for model in self._models.values():
            model.runtime.grow(capacity)
            model.joined = _longer(model.joined, more)

    def _start_anew(self, slots: NDArray[np.int64]) -> None:
        if not len(slots):
            return
        self._seen[slots] = 0
        self._past_x[slots] = 0.0
        self._past_ts[slots] = 0
        self._next[slots] = 0
        for model in self._models.values():
            model.runtime.reset(slots)

    def _roles(self, bars: BarColumns, groups: Groups) -> dict[str, NDArray[np.int8]]:
        """Code of every row's role, for each loaded bundle.

        A champion is never its own rival, and no bar has two bundles to be acted on: of arms that
        overlap the first has it, and the champion goes on beside it.
        """
        roles = {version: np.zeros(len(bars), np.int8) for version in self._models}
        is_served = np.zeros(len(bars), np.bool_)
        for partition, here in groups:
            schedule = self.schedules.get(partition)
            if schedule is None:
                continue
            ts = bars.ts[here]
            for challenger in filter(schedule.changes.get, CHALLENGERS):
                for version, _, held in schedule.holders(challenger, ts):
                    if version in roles:
                        roles[version][here[held]] = _CHALLENGER
            for code, arm in enumerate(ARM_SLOTS, _FIRST_ARM):
                for version, change, held in schedule.holders(arm, ts):
                    if version in roles:
                        open_to = here[held & ~is_served[here]].tolist()
                        rows = [row for row in open_to if change.serves(bars.symbols[row])]
                        roles[version][rows] = code
                        is_served[rows] = True
            for version, _, held in schedule.holders("champion", ts):
                if version in roles:
                    rows_held = here[held]
                    role = roles[version]
                    is_beside = is_served[rows_held] & (role[rows_held] < _FIRST_ARM)
                    role[rows_held] = np.where(is_beside, _CONTROL, _CHAMPION)
        return roles

    def _affordable(self, slots: NDArray[np.int64], roles: Mapping[str, NDArray[np.int8]]) -> int:
        """How many of the first bars can be taken before too many rows must be rebuilt."""
        rebuilt = np.zeros(len(slots), np.int64)
        for version, role in roles.items():
            joined = self._models[version].joined[slots]
            if not joined.all():
                new = np.flatnonzero((role != _NONE) & ~joined)
                joining, first = np.unique(slots[new], return_index=True)
                past = np.clip(self._seen[joining] - WARM_UP_BARS, 0, self.remembered_bars)
                rebuilt[new[first]] += past
        if not rebuilt.any():
            return len(slots)
        return max(1, int(np.searchsorted(np.cumsum(rebuilt), self.rebuilt_rows, "right")))

    def _join(self, model: _Model, slots: NDArray[np.int64], role: NDArray[np.int8]) -> None:
        """Rebuild the model's state for symbols on which it runs from this bar on."""
        runs = role != _NONE
        if not runs.all():
            model.joined[slots[~runs]] = False
        joining = slots[runs & ~model.joined[slots]]
        if not len(joining):
            return
        order = (self._next[joining, None] + np.arange(self.remembered_bars)) % self.remembered_bars
        past = self._past_x[joining[:, None], order]
        lengths = np.minimum(self._seen[joining] - 1 - WARM_UP_BARS, self.remembered_bars)
        model.runtime.rebuild(joining, past, lengths)
        model.joined[joining] = True

    def _attention(
        self, slots: NDArray[np.int64], ts: NDArray[np.int64], weights: NDArray[np.float32]
    ) -> Attention:
        m, k = len(slots), min(self.attention_top, weights.shape[1])
        attention = Attention(
            np.empty((m, k), np.int64),
            np.empty((m, k), np.int64),
            np.empty((m, k), np.float32),
            np.empty(m, np.float32),
        )
        _find_heaviest(slots, ts, weights, self._past_ts, self._next, *attention)
        return attention


_LAYOUT = str(STATE)
_NONE, _CHAMPION, _CHALLENGER, _CONTROL, _FIRST_ARM = range(5)
_MEANING: Mapping[int, tuple[Role, Arm]] = {
    _CHAMPION: ("champion", "a"),
    _CHALLENGER: ("challenger", "a"),
    _CONTROL: ("control", "a"),
    **{_FIRST_ARM + i: ("champion", ARM_OF[slot]) for i, slot in enumerate(ARM_SLOTS)},
}


class _Told(NamedTuple):
    """What one bundle says in a round: m of its bars, with their slots and the code of each's role."""

    version: str
    runs: Rows
    where: Rows
    role: NDArray[np.int8]
    step: Step


def _stand_in(told: list[_Told], n: int) -> None:
    """Let the champion speak for itself where the arm that has a bar is not warm yet."""
    is_served = np.zeros(n, np.bool_)
    for one in told:
        is_served[one.runs[one.role >= _FIRST_ARM]] = True
    for one in told:
        one.role[(one.role == _CONTROL) & ~is_served[one.runs]] = _CHAMPION


def _by_partition(partitions: NDArray[np.int64]) -> Groups:
    there = np.bincount(partitions).nonzero()[0].tolist()
    if len(there) == 1:
        return [(there[0], np.arange(len(partitions)))]
    return [(partition, (partitions == partition).nonzero()[0]) for partition in there]


def _codes_in(roles: NDArray[np.int8]) -> list[int]:
    found = set(np.bincount(roles).nonzero()[0].tolist()) - {_NONE}
    return sorted(found | {_CHAMPION} if _CONTROL in found else found)


def _rounds(slots: NDArray[np.int64], rows: Rows) -> Iterator[Rows]:
    """Split rows into rounds in which each slot occurs once, a slot's rows in their order.

    Within a round they are sorted by slot: state is then read in the order in which it lies.
    """
    if len(rows) <= 1:
        yield from [rows] * len(rows)
        return
    rows = rows[np.argsort(slots[rows], kind="stable")]
    at = slots[rows]
    is_other = at[1:] != at[:-1]
    if is_other.all():
        yield rows
        return
    first = np.flatnonzero(np.r_[True, is_other])
    lengths = np.diff(np.r_[first, len(at)])
    turn = np.arange(len(at)) - np.repeat(first, lengths)
    by_turn = np.argsort(turn, kind="stable")
    yield from np.split(rows[by_turn], np.cumsum(np.bincount(turn))[:-1])


@njit(cache=True, nogil=True)
def _remember(past_x, past_ts, following, slots, x, ts):  # type: ignore[no-untyped-def]
    for i in range(slots.size):
        slot = slots[i]
        place = following[slot]
        past_x[slot, place] = x[i]
        past_ts[slot, place] = ts[i]
        following[slot] = (place + 1) % past_ts.shape[1]


@njit(cache=True, nogil=True)
def _find_heaviest(  # type: ignore[no-untyped-def]
    slots, ts, weights, past_ts, following, lags, when, heaviest, entropy
):
    """The k heaviest steps by insertion, of equal ones the newer first, and the entropy of all."""
    k, R = lags.shape[1], past_ts.shape[1]
    for i in range(slots.size):
        spread = np.float32(0)
        held = 0
        for lag in range(weights.shape[1]):
            weight = weights[i, lag]
            if weight > 0:
                spread -= weight * np.log(weight)
            if held == k and weight <= heaviest[i, k - 1]:
                continue
            place = held if held < k else k - 1
            held = min(held + 1, k)
            while place > 0 and heaviest[i, place - 1] < weight:
                heaviest[i, place], lags[i, place] = heaviest[i, place - 1], lags[i, place - 1]
                place -= 1
            heaviest[i, place], lags[i, place] = weight, lag
        for place in range(k):
            lag = lags[i, place]
            back = past_ts[slots[i], (following[slots[i]] - lag) % R]
            when[i, place] = ts[i] if lag == 0 else back
        entropy[i] = max(spread, np.float32(0))


def _joined_parts(bundle: Bundle, code: int, parts: list[tuple[Any, ...]]) -> Forecast:
    role, arm = _MEANING[code]
    if len(parts) == 1:
        (rows, values, probabilities, attention) = parts[0]
        return Forecast(bundle, role, rows, values, probabilities, attention, arm)
    rows, values, probabilities, attention = zip(*parts, strict=True)
    return Forecast(
        bundle,
        role,
        np.concatenate(rows),
        np.concatenate(values),
        {k: np.concatenate([p[k] for p in probabilities]) for k in probabilities[0]},
        Attention(*map(np.concatenate, zip(*attention, strict=True))),
        arm,
    )


def _longer(array: NDArray[Any], more: int) -> NDArray[Any]:
    """What is not used yet of it takes no memory."""
    longer = np.zeros((len(array) + more, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer


def _prefixed(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {f"{prefix}/{name}": array for name, array in arrays.items()}


def _unprefixed(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    start = f"{prefix}/"
    return {name[len(start) :]: a for name, a in arrays.items() if name.startswith(start)}
