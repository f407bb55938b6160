"""Bytes to columns and back. Bars are decoded in batches into arrays: no object per bar survives it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, repeat
from math import isfinite
from operator import attrgetter
from typing import Literal, TypeVar

import msgspec
import numpy as np
from numba import njit
from numpy.typing import NDArray
from pydantic import ValidationError

from schemas.messages import (
    EARLIEST_TS,
    LATEST_TS,
    Arm,
    Bar,
    Message,
    Role,
    series_key,
)

MAX_BAR_BYTES = 64 * 1024


@dataclass(frozen=True)
class BarColumns:
    """n bars in arrival order: `symbols` list of n, `ts` i64[n] epoch ms, `ohlcv` f64[n, 5]."""

    symbols: list[str]
    ts: NDArray[np.int64]
    ohlcv: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.symbols)


@dataclass(frozen=True)
class PredictionColumns:
    """n predictions in arrival order, as lists: they are joined one by one."""

    symbols: list[str]
    ts: list[int]
    targets: list[str]
    values: list[float]
    bundles: list[str]
    roles: list[Role]
    arms: list[Arm]

    def __len__(self) -> int:
        return len(self.symbols)


@dataclass(frozen=True)
class Rejected:
    """A message that is no bar: its place in the batch, and why."""

    index: int
    reason: str


# Without `gc=False` collections of garbage make a batch a third slower to decode.
class _WireBar(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True, gc=False):
    symbol: str
    ts: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    extra: dict[str, float] | None = None
    schema_version: Literal[1] = 1


_bar_decoder = msgspec.json.Decoder(_WireBar)


def decode_bars(
    values: Sequence[bytes | None],
) -> tuple[BarColumns, NDArray[np.intp], list[Rejected]]:
    """Decode a batch of `market.bars` values by the rules of `Bar`.

    Returns the good bars as columns, their places in `values` (intp[n]), and the rejected rest.
    Nothing is raised: whatever the bytes are, each value is in exactly one of the two. A plain bar
    takes the fast way; of whatever else there is (unknown fields, for one) `Bar` is the judge.
    """
    rejected: list[Rejected] = []

    def judged(index: int, value: bytes, _: Exception) -> _WireBar | None:
        verdict = _judged(value)
        if isinstance(verdict, str):
            rejected.append(Rejected(index, verdict))
            return None
        return verdict

    bars, places = _decoded(_bar_decoder.decode, values, judged, rejected)
    ts = _event_times([b.ts for b in bars])
    ohlcv = np.empty((len(bars), 5))
    for column, name in enumerate(("open", "high", "low", "close", "volume")):
        ohlcv[:, column] = list(map(attrgetter(name), bars))
    good = _is_possible(ts, ohlcv)
    symbols = [b.symbol for b in bars]
    lengths = np.fromiter(map(len, symbols), np.int64, len(bars))
    good &= (lengths > 0) & (lengths <= 64)
    for i, bar in enumerate(bars):
        if bar.extra is not None and not all(map(isfinite, bar.extra.values())):
            good[i] = False
    if not good.all():
        rejected += [
            Rejected(places[i], reason_of(values[places[i]])) for i in np.flatnonzero(~good)
        ]
        symbols = [symbol for symbol, keep in zip(symbols, good, strict=True) if keep]
    return BarColumns(symbols, ts[good], ohlcv[good]), np.array(places, np.intp)[good], rejected


def encode_bars(bars: BarColumns) -> list[bytes]:
    """`Bar` messages for n bars; they are not checked."""
    return [
        _encode(_WireBar(symbol, ts, *ohlcv))
        for symbol, ts, ohlcv in zip(
            bars.symbols, bars.ts.tolist(), bars.ohlcv.tolist(), strict=True
        )
    ]


Decoded = TypeVar("Decoded")


def _decoded(
    decode: Callable[[bytes], Decoded],
    values: Sequence[bytes | None],
    otherwise: Callable[[int, bytes, Exception], Decoded | None],
    rejected: list[Rejected],
) -> tuple[list[Decoded], list[int]]:
    """What could be decoded, and its places; all at once where nothing is wrong.

    `otherwise` is asked for what `decode` refuses; values of no fit size go to `rejected`.
    """
    try:
        if max(map(len, values), default=0) <= MAX_BAR_BYTES:  # type: ignore[arg-type]
            return list(map(decode, values)), list(range(len(values)))  # type: ignore[arg-type]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError):
        pass  # one by one
    good: list[Decoded] = []
    places: list[int] = []
    for index, value in enumerate(values):
        if value is None or len(value) > MAX_BAR_BYTES:
            rejected.append(Rejected(index, _size_reason(value)))
            continue
        try:
            one: Decoded | None = decode(value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            one = otherwise(index, value, error)
        if one is not None:
            good.append(one)
            places.append(index)
    return good, places


_encode = msgspec.json.Encoder().encode


def encode_predictions(
    symbols: Sequence[str],
    ts: NDArray[np.int64],
    values: NDArray[np.float64],
    probabilities: NDArray[np.float64] | None,
    *,
    target: str,
    horizon: int,
    interval_ms: int,
    bundle: str,
    role: Role,
    arm: Arm = "a",
) -> list[bytes]:
    """`Prediction` messages of one target for m bars; values f64[m], probabilities f64[m, classes].

    The text is put together from parts that are the same for a symbol, for a bar time or for all.
    """
    about = f'"horizon":{horizon},"target":{_text(target)},"value":'
    times = {
        at: (f"{at:011x}", f'{at},"horizon_ts":{at + horizon * interval_ms},{about}')
        for at in np.unique(ts).tolist()
    }
    end = f',"bundle":{_text(bundle)},"role":"{role}"'
    if arm != "a":
        end += f',"arm":"{arm}"'
    ends: Iterable[str] = repeat(end + "}", len(symbols))
    if probabilities is not None:
        ends = [f'{end},"probabilities":{_text(row)}}}' for row in probabilities.tolist()]
    names = map(_named, symbols, repeat(target), repeat(bundle))
    said = _text(values.tolist())[1:-1].split(",") if len(values) else []
    return [
        f'{{"id":"{key}{stamp}","symbol":{symbol},"ts":{when}{value}{end}'.encode()
        for (key, symbol), (stamp, when), value, end in zip(
            names, map(times.__getitem__, ts.tolist()), said, ends, strict=True
        )
    ]


def _text(value: object) -> str:
    return _encode(value).decode()


@lru_cache(maxsize=1 << 20)
def _named(symbol: str, target: str, bundle: str) -> tuple[str, str]:
    """What the ids of a series begin with, and the symbol as JSON."""
    return series_key(symbol, target, bundle), _text(symbol)


class _WireScored(msgspec.Struct, gc=False):
    """The part of a `Prediction` that is scored."""

    symbol: str
    ts: int
    target: str
    value: float
    bundle: str
    role: Role
    arm: Arm = "a"


_prediction_decoder = msgspec.json.Decoder(_WireScored)


def decode_predictions(
    values: Sequence[bytes | None],
) -> tuple[PredictionColumns, list[int], list[Rejected]]:
    """Decode a batch of `signals.predictions` values as far as they are scored.

    Returns the good ones as columns, their places in `values`, and the rejected rest; as
    `decode_bars`, it raises nothing.
    """
    rejected: list[Rejected] = []

    def refused(index: int, _: bytes, error: Exception) -> None:
        rejected.append(Rejected(index, str(error)))

    good, places = _decoded(_prediction_decoder.decode, values, refused, rejected)
    timeless = np.flatnonzero(_event_times([p.ts for p in good]) < EARLIEST_TS).tolist()
    for i in reversed(timeless):
        rejected.append(Rejected(places[i], f"ts {good[i].ts} is no event time"))
        del good[i], places[i]
    columns = PredictionColumns(
        [p.symbol for p in good],
        [p.ts for p in good],
        [p.target for p in good],
        [p.value for p in good],
        [p.bundle for p in good],
        [p.role for p in good],
        [p.arm for p in good],
    )
    return columns, places, rejected


Series = tuple[str, str, str, Role, Arm]
"""Symbol, target, bundle, role and arm of a prediction."""


def encode_outcomes(
    series: Sequence[Series],
    which: NDArray[np.int64],
    ts: NDArray[np.int64],
    matured_ts: NDArray[np.int64],
    values: NDArray[np.float64],
    labels: NDArray[np.float64],
    losses: NDArray[np.float64],
    reference_losses: NDArray[np.float64],
) -> list[bytes]:
    """`Outcome` messages from columns of n; `which` is the place of each row's own in `series`.

    They are not checked. The text is put together from parts as in `encode_predictions`.
    """
    parts = [
        (
            f'{{"prediction_id":"{key}',
            f'","symbol":{name},"ts":',
            f',"target":{_text(target)},"bundle":{_text(bundle)},"role":"{role}","value":',
            "}" if arm == "a" else f',"arm":"{arm}"}}',
        )
        for symbol, target, bundle, role, arm in series
        for key, name in (_named(symbol, target, bundle),)
    ]
    times = {at: (f"{at:011x}", at) for at in np.unique(ts).tolist()}
    scores = [
        _text(column.tolist())[1:-1].split(",")
        for column in (values, labels, losses, reference_losses)
    ]
    return [
        f'{start}{stamp}{symbol}{when},"matured_ts":{matured}{about}{value},"label":{label},'
        f'"loss":{loss},"reference_loss":{reference}{end}'.encode()
        for (start, symbol, about, end), (stamp, when), matured, (
            value,
            label,
            loss,
            reference,
        ) in zip(
            map(parts.__getitem__, which.tolist()),
            map(times.__getitem__, ts.tolist()),
            matured_ts.tolist(),
            zip(*scores, strict=True),
            strict=True,
        )
    ]


def encode_attention(
    symbols: Sequence[str],
    ts: NDArray[np.int64],
    top_ts: NDArray[np.int64],
    top_lags: NDArray[np.int64],
    top_weights: NDArray[np.float32],
    entropy: NDArray[np.float32],
    *,
    target: str,
    bundle: str,
    role: Role,
) -> list[bytes]:
    """`AttentionSummary` messages for m bars; the tops are [m, k], heaviest first.

    Steps that carry no weight (a window not yet filled) are left out. Weights are rounded to
    six digits: they are for people and charts.
    """
    m, k = top_ts.shape
    text = np.empty(m * (_STEP_BYTES * k + _SPREAD_BYTES), np.uint8)
    ends = np.zeros(m + 1, np.int64)
    _write_rests(
        np.ascontiguousarray(top_ts),
        np.ascontiguousarray(top_lags),
        top_weights.astype(np.float64),
        entropy.astype(np.float64),
        text,
        ends,
    )
    rests = text[: ends[-1]].tobytes()
    times = {at: (f"{at:011x}", str(at)) for at in np.unique(ts).tolist()}
    about = f'"bundle":{_text(bundle)},"role":"{role}","top":['
    names = map(_named, symbols, repeat(target), repeat(bundle))
    return [
        f'{{"prediction_id":"{key}{stamp}","symbol":{symbol},"ts":{at},{about}'.encode()
        + rests[start:end]
        for (key, symbol), (stamp, at), (start, end) in zip(
            names, map(times.__getitem__, ts.tolist()), pairwise(ends.tolist()), strict=True
        )
    ]


_STEP_BYTES, _SPREAD_BYTES = 80, 96
"""Room for one step, and for what follows the last."""
_TS, _LAG, _WEIGHT, _NEXT, _ENTROPY, _LENGTH, _END = (
    np.frombuffer(text, np.uint8).copy()
    for text in (
        b'{"ts":',
        b',"lag":',
        b',"weight":',
        b"},",
        b'],"entropy":',
        b',"effective_length":',
        b"}",
    )
)


@njit(cache=True, nogil=True)
def _write_rests(top_ts, top_lags, top_weights, entropy, text, ends):  # type: ignore[no-untyped-def]
    """The JSON of m summaries from within the list `top` on, one after the other; i ends at ends[i + 1]."""
    at = 0
    for i in range(top_ts.shape[0]):
        start = at
        for k in range(top_ts.shape[1]):
            if top_weights[i, k] < 5e-7:
                continue
            if at > start:
                at = _put(text, at, _NEXT)
            at = _put_integer(text, _put(text, at, _TS), top_ts[i, k])
            at = _put_integer(text, _put(text, at, _LAG), top_lags[i, k])
            at = _put_decimal(text, _put(text, at, _WEIGHT), top_weights[i, k], 6)
        if at > start:
            at = _put(text, at, _END)
        at = _put_decimal(text, _put(text, at, _ENTROPY), entropy[i], 6)
        at = _put_decimal(text, _put(text, at, _LENGTH), np.exp(entropy[i]), 4)
        at = _put(text, at, _END)
        ends[i + 1] = at


@njit(cache=True)
def _put(row, at, text):  # type: ignore[no-untyped-def]
    for k in range(text.size):
        row[at + k] = text[k]
    return at + text.size


@njit(cache=True)
def _put_integer(row, at, value):  # type: ignore[no-untyped-def]
    digits, rest = 1, value // 10
    while rest:
        digits, rest = digits + 1, rest // 10
    for k in range(digits - 1, -1, -1):
        row[at + k] = 48 + value % 10
        value //= 10
    return at + digits


@njit(cache=True)
def _put_decimal(row, at, value, places):  # type: ignore[no-untyped-def]
    """A number that is not negative, rounded to so many places."""
    unit = 10**places
    scaled = np.int64(value * unit + 0.5)
    at = _put_integer(row, at, scaled // unit)
    row[at] = 46
    rest = scaled % unit
    for k in range(places, 0, -1):
        row[at + k] = 48 + rest % 10
        rest //= 10
    return at + 1 + places


def reason_of(value: bytes | None) -> str:
    """Why `value` is no `Bar`, in one line for the dead-letter header."""
    judged = _judged(value or b"")
    return judged if isinstance(judged, str) else "bar: refused"


def _judged(value: bytes) -> _WireBar | str:
    """What `Bar` says about it: the bar, or the reason why it is none."""
    try:
        bar = Bar.model_validate_json(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or "bar"
        return f"{place}: {first['msg']}"
    return _WireBar(
        bar.symbol, bar.ts, bar.open, bar.high, bar.low, bar.close, bar.volume, bar.extra
    )


def encode(message: Message) -> bytes:
    """JSON bytes of any message; fields that are None are left out."""
    return message.model_dump_json(exclude_none=True).encode()


def _size_reason(value: bytes | None) -> str:
    return "empty value" if value is None else f"{len(value)} bytes, at most {MAX_BAR_BYTES}"


def _event_times(ts: list[int]) -> NDArray[np.int64]:
    """-1 where it is no event time."""
    try:
        times = np.array(ts, np.int64)
    except OverflowError:
        times = np.array([at if EARLIEST_TS <= at <= LATEST_TS else -1 for at in ts], np.int64)
    return np.where((times >= EARLIEST_TS) & (times <= LATEST_TS), times, -1)


def _is_possible(ts: NDArray[np.int64], ohlcv: NDArray[np.float64]) -> NDArray[np.bool_]:
    open_, high, low, close, volume = ohlcv.T
    return np.asarray(
        (ts >= EARLIEST_TS)
        & np.isfinite(ohlcv).all(axis=1)
        & (ohlcv[:, :4] > 0).all(axis=1)
        & (volume >= 0)
        & (low <= np.minimum(open_, close))
        & (high >= np.maximum(open_, close))
    )
