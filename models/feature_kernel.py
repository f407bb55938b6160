"""The compiled kernel behind `models.features`: one symbol's state, and its update by one bar in O(1).

Shapes: W windows, H half-lives. What is written where is told by `models.features.FEATURES`.
"""

from math import cos, log, log1p, pi, sin, sqrt
from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
WEEK_MS: Final = 7 * DAY_MS

OK: Final = 0
RESET: Final = 1
DUPLICATE: Final = 2
LATE: Final = 3

RING: Final = 448
"""Returns kept per symbol: more than the longest window looks back."""
WARM_UP_BARS: Final = 390
"""Bars since the last reset before which windows are not full: neither trained on nor published."""

WINDOWS: Final = (3, 6, 12, 24, 48, 78, 156, 390)
HALF_LIVES: Final = (2, 6, 20, 78, 390, 1950)
AHEAD: Final = (1, 6, 12, 30)
"""Bars ahead for which the time-of-day profile gives an expectation."""
_2, _6, _20, _78, _390, _1950 = range(len(HALF_LIVES))

# Rows of the table of exponentially weighted means. Absent bars enter rows up to _VOLUME as zeros
# and leave the rows after it (means over real bars only) alone.
(
    _R2,
    _GK,
    _CALM,
    _BIPOWER,
    _DOWN2,
    _R,
    _ABS,
    _LAG,
    _R3,
    _R4,
    _PK,
    _RS,
    _MOVED,
    _PRESENT,
    _TRADED,
    _FLOW,
    _VOLUME,
    _LOG_GK,
    _LOG_GK2,
    _LOG_VOLUME,
) = range(20)
_ROWS: Final = 20
# Places in the array that `clock_and_decays` makes.
_INTERVAL_MS, _MAX_FILL, _RESET_MS, _PERIOD_MS, _BUCKET_MS, _BUCKETS, _BARS_PER_BUCKET = range(7)

MAX_RETURN: Final = 1.5
"""Log returns are clipped here, a factor 4.5 within one bar: beyond it is an error in the feed."""
JUMP: Final = log(1.8)
"""From a close to the next open: a split (2:1, 1:10, ...) or an error in the feed, and no return."""
TALLIED: Final = ("filled", "break", "jump")
"""What is counted between two bars of a symbol: absent bars, session breaks, jumps."""
_FILLED, _BREAK, _JUMP = range(len(TALLIED))
RETURN2_UNIT: Final = 1e-16
"""Squared returns are summed in windows as integers of this unit: exact, so nothing drifts."""
VARIANCE_FLOOR: Final = 1e-12
_MIN_BUCKET_MS: Final = 300_000
_MAX_BUCKETS: Final = DAY_MS // _MIN_BUCKET_MS
_STOCHASTIC_BARS: Final = 14
_HALF_LIFE = np.array(HALF_LIVES, dtype=np.float64)
_WINDOW = np.array(WINDOWS, dtype=np.int64)
_AHEAD = np.array(AHEAD, dtype=np.int64)
_DECAY = 2.0 ** (-1.0 / _HALF_LIFE)
_UNIT_TREND = np.sqrt((1 + _DECAY) / (1 - _DECAY))
_PRICE_LAG = _DECAY / (1 - _DECAY)
_GAP_DECAY: Final = 2.0 ** (-1 / 10)

STATE: Final = np.dtype(
    [
        ("last_ts", "i8"),
        ("bars_seen", "i8"),
        ("step", "i8"),
        ("bucket_id", "i8"),
        ("day", "i8"),
        ("tail", "i8", len(WINDOWS)),
        ("tail_step", "i8", len(WINDOWS)),
        ("sum_r2", "i8", len(WINDOWS)),
        ("ewm", "f8", (_ROWS, len(HALF_LIVES))),
        ("weight_steps", "f8", len(HALF_LIVES)),
        ("weight_bars", "f8", len(HALF_LIVES)),
        ("weight_traded", "f8", len(HALF_LIVES)),
        ("log_close", "f8"),
        ("last_return", "f8"),
        ("bucket_g", "f8"),
        ("bucket_bars", "f8"),
        ("bucket_volume", "f8"),
        ("bucket_traded", "f8"),
        ("session_bars", "f8"),
        ("session_return", "f8"),
        ("session_high", "f8"),
        ("session_low", "f8"),
        ("gap_return", "f8"),
        ("gap_size", "f8"),
        ("gap2", "f8"),
        ("gap_weight", "f8"),
        ("closed_time", "f8"),
        ("ring_range", "f8", (_STOCHASTIC_BARS, 2)),
        ("ring_return", "f4", RING),
        ("ring_steps", "u2", RING),
        ("season", "f4", _MAX_BUCKETS),
        ("yesterday", "f4", _MAX_BUCKETS),
        ("season_volume", "f4", _MAX_BUCKETS),
        ("days", "u1", _MAX_BUCKETS),
    ],
    align=True,
)
"""All that is kept of one symbol."""


def clock_and_decays(
    interval_ms: int, max_fill: int, reset_after_ms: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The constants of a market as `run` takes them."""
    period = DAY_MS if interval_ms < DAY_MS else WEEK_MS
    bucket = interval_ms * -(-_MIN_BUCKET_MS // interval_ms)
    clock = np.array(
        [
            interval_ms,
            max_fill,
            reset_after_ms,
            period,
            bucket,
            -(-period // bucket),
            bucket // interval_ms,
        ],
        dtype=np.int64,
    )
    return clock, _DECAY ** np.arange(max_fill + 2)[:, None]


@njit(cache=True)
def steps_between(before_ms: int, after_ms: int, interval_ms: int, max_fill: int) -> int:
    """Bar intervals from one bar to the next; 0 where a session break lies between."""
    steps = max(1, (after_ms - before_ms + interval_ms // 2) // interval_ms)
    return steps if steps <= max_fill + 1 else 0


@njit(cache=True)
def market_steps(
    before_ms: int, after_ms: int, interval_ms: int, max_fill: int, closes: NDArray[np.int64]
) -> int:
    """`steps_between` on a calendar: a close between is a break; days are counted in sessions.

    Past the calendar's ends, and without one, the rule is `steps_between`'s.
    """
    if closes.size == 0 or before_ms < closes[0] or after_ms > closes[-1]:
        return steps_between(before_ms, after_ms, interval_ms, max_fill)
    sessions = np.searchsorted(closes, after_ms) - np.searchsorted(closes, before_ms)
    if interval_ms < DAY_MS:
        return 0 if sessions > 0 else steps_between(before_ms, after_ms, interval_ms, max_fill)
    steps = max(1, int((2 * sessions * DAY_MS + interval_ms) // (2 * interval_ms)))
    return steps if steps <= max_fill + 1 else 0


@njit(cache=True)
def run(state, slots, ts, ohlcv, clock, decays, offsets, closes, x, status, tally):  # type: ignore[no-untyped-def]
    """Take bars in order: features into x f32[n, F], what became of each into status i8[n].

    What lay between them is added to tally i64[TALLIED].
    """
    for i in range(slots.size):
        s = state[slots[i]]
        status[i] = _update(s, ts[i], ohlcv[i], clock, offsets, decays, closes, x[i], tally)


@njit(cache=True)
def _update(s, ts, bar, clock, offsets, decays, closes, out, tally):  # type: ignore[no-untyped-def]
    interval, max_fill, reset_after = clock[_INTERVAL_MS], clock[_MAX_FILL], clock[_RESET_MS]
    if s.bars_seen > 0 and ts <= s.last_ts:
        out[:] = 0
        return DUPLICATE if ts == s.last_ts else LATE
    is_reset = s.bars_seen == 0 or ts - s.last_ts > reset_after
    if is_reset:
        _clear(s)
    steps = 0 if is_reset else market_steps(s.last_ts, ts, interval, max_fill, closes)
    since_last = 0.0 if is_reset else log(max(1.0, (ts - s.last_ts) / interval))
    local = ts + _offset_ms(offsets, ts)
    log_open, log_close = log(bar[0]), log(bar[3])
    log_high = max(log(bar[1]), log_open, log_close)
    log_low = min(log(bar[2]), log_open, log_close)
    gap = 0.0 if is_reset else log_open - s.log_close
    is_open = steps == 0
    if abs(gap) > JUMP:
        tally[_JUMP] += 1
        gap, is_open = 0.0, True
    if is_open:
        if not is_reset:
            tally[_BREAK] += 1
            _open_session_gap(s, gap, ts - s.last_ts)
        s.log_close, s.last_return = log_open, 0.0
        steps = 1
    elif steps > 1:
        tally[_FILLED] += steps - 1
        s.last_return = 0.0
    r = min(max(log_close - s.log_close, -MAX_RETURN), MAX_RETURN)
    bucket_id = local // clock[_BUCKET_MS]
    if bucket_id != s.bucket_id:
        _learn_season(s, clock)
        s.bucket_id = bucket_id
    bucket = _bucket(bucket_id, clock)
    _roll_windows(s, bar, r, steps)
    g = _roll_means(s, log_open, log_high, log_low, log_close, r, bar[4], bucket, decays[steps])
    day = local // DAY_MS
    if is_open or day != s.day:
        s.day = day
        s.session_bars, s.session_return = 0.0, 0.0
        s.session_high, s.session_low = log_high, log_low
    s.session_bars += steps
    s.session_return += r
    s.session_high = max(s.session_high, log_high)
    s.session_low = min(s.session_low, log_low)
    s.last_ts = ts
    s.log_close, s.last_return = log_close, r
    _write(s, out, r, g, bar[3], bar[4], local, bucket, since_last, clock)
    return RESET if is_reset else OK


@njit(cache=True)
def _clear(s):  # type: ignore[no-untyped-def]
    s.bars_seen, s.step, s.bucket_id = 0, 0, -1
    s.tail[:] = 0
    s.tail_step[:] = 1
    s.sum_r2[:] = 0
    s.ewm[:] = 0.0
    s.weight_steps[:] = 0.0
    s.weight_bars[:] = 0.0
    s.weight_traded[:] = 0.0
    s.bucket_g, s.bucket_bars, s.bucket_volume, s.bucket_traded = 0.0, 0.0, 0.0, 0.0
    s.gap_return, s.gap_size, s.gap2, s.gap_weight, s.closed_time = 0.0, 0.0, 0.0, 0.0, 0.0
    s.season[:] = 1.0
    s.yesterday[:] = 0.0
    s.season_volume[:] = 0.0
    s.days[:] = 0


@njit(cache=True)
def _offset_ms(offsets, ts):  # type: ignore[no-untyped-def]
    low, high = 0, offsets.shape[0]
    while high - low > 1:
        middle = (low + high) // 2
        if offsets[middle, 0] <= ts:
            low = middle
        else:
            high = middle
    return offsets[low, 1]


@njit(cache=True)
def _mean(s, row, h):  # type: ignore[no-untyped-def]
    return s.ewm[row, h] / s.weight_steps[h]


@njit(cache=True)
def _open_session_gap(s, gap, closed_ms):  # type: ignore[no-untyped-def]
    gap = min(max(gap, -MAX_RETURN), MAX_RETURN)
    variance = _mean(s, _GK, _78) + VARIANCE_FLOOR
    s.gap_return = min(max(gap / sqrt(78 * variance), -8.0), 8.0)
    s.gap_size = log1p(abs(gap) / sqrt(variance))
    s.gap2 = _GAP_DECAY * s.gap2 + (1 - _GAP_DECAY) * gap * gap
    s.gap_weight = _GAP_DECAY * s.gap_weight + 1 - _GAP_DECAY
    s.closed_time = log1p(closed_ms / HOUR_MS)


@njit(cache=True)
def _bucket(bucket_id, clock):  # type: ignore[no-untyped-def]
    """Place of a bucket in the day (in the week for bars of a day and longer)."""
    return (bucket_id * clock[_BUCKET_MS] % clock[_PERIOD_MS]) // clock[_BUCKET_MS]


@njit(cache=True)
def _learn_season(s, clock):  # type: ignore[no-untyped-def]
    """The bucket of the bars before has ended: its mean becomes part of the profile."""
    if s.bucket_bars > 0:
        b = _bucket(s.bucket_id, clock)
        g = s.bucket_g / s.bucket_bars
        ratio = min(g / (_mean(s, _GK, _390) + VARIANCE_FLOOR), 20.0)
        rate = max(1.0 / (s.days[b] + 3.0), 1.0 / 30.0)
        s.season[b] += rate * (ratio - s.season[b])
        if s.bucket_traded > 0:
            s.season_volume[b] += rate * (s.bucket_volume / s.bucket_traded - s.season_volume[b])
        s.yesterday[b] = g
        s.days[b] = min(s.days[b] + 1, 255)
    s.bucket_g, s.bucket_bars, s.bucket_volume, s.bucket_traded = 0.0, 0.0, 0.0, 0.0


@njit(cache=True)
def _roll_windows(s, bar, r, steps):  # type: ignore[no-untyped-def]
    """Put the bar into the ring, and keep the sums of r^2 over the last w steps."""
    place = s.bars_seen % RING
    recent = s.bars_seen % _STOCHASTIC_BARS
    s.ring_range[recent, 0] = max(bar[1], bar[3])
    s.ring_range[recent, 1] = min(bar[2], bar[3])
    s.ring_return[place] = r
    s.ring_steps[place] = steps
    s.bars_seen += 1
    s.step += steps
    new = _square(s.ring_return[place])
    for k in range(_WINDOW.size):
        total = s.sum_r2[k] + new
        tail, tail_step, first = s.tail[k], s.tail_step[k], s.step - _WINDOW[k]
        while tail_step <= first:
            total -= _square(s.ring_return[tail % RING])
            tail += 1
            tail_step += s.ring_steps[tail % RING]
        s.sum_r2[k], s.tail[k], s.tail_step[k] = total, tail, tail_step


@njit(cache=True)
def _square(r):  # type: ignore[no-untyped-def]
    return np.int64(np.float64(r) * np.float64(r) / RETURN2_UNIT + 0.5)


@njit(cache=True)
def _roll_means(s, log_open, log_high, log_low, log_close, r, volume, bucket, decay):  # type: ignore[no-untyped-def]
    """Update the exponentially weighted means; returns g, the bar's variance by its range."""
    up, down, body = log_high - log_open, log_low - log_open, log_close - log_open
    spread = min(up - down, MAX_RETURN)
    jump = min(abs(log_open - s.log_close), MAX_RETURN)
    g = 0.5 * spread**2 - (2 * log(2.0) - 1) * min(body**2, spread**2) + jump**2
    flow = (2 * log_close - log_high - log_low) / (up - down) if up > down else 0.0
    ewm = s.ewm
    for h in range(_HALF_LIFE.size):
        kept, new = decay[h], 1 - _DECAY[h]
        s.weight_steps[h] = 1 + kept * (s.weight_steps[h] - 1)
        for row in range(_VOLUME + 1):
            ewm[row, h] *= kept
        ewm[_R2, h] += new * r * r
        ewm[_GK, h] += new * g
        ewm[_CALM, h] += new * g / (s.season[bucket] + 0.02)
        ewm[_BIPOWER, h] += new * (pi / 2) * abs(r * s.last_return)
        ewm[_DOWN2, h] += new * (r * r if r < 0 else 0.0)
        ewm[_R, h] += new * r
        ewm[_ABS, h] += new * abs(r)
        ewm[_LAG, h] += new * r * s.last_return
        ewm[_R3, h] += new * r**3
        ewm[_R4, h] += new * r**4
        ewm[_PK, h] += new * spread**2 / (4 * log(2.0))
        ewm[_RS, h] += new * min(up * (up - body) + down * (down - body), MAX_RETURN**2)
        ewm[_MOVED, h] += new * (r != 0)
        ewm[_PRESENT, h] += new
        ewm[_TRADED, h] += new * (volume > 0)
        ewm[_FLOW, h] += new * flow * volume
        ewm[_VOLUME, h] += new * volume
    log_g = log(g + 0.02 * _mean(s, _GK, _78) + VARIANCE_FLOOR)
    for h in range(_HALF_LIFE.size):
        kept, new = _DECAY[h], 1 - _DECAY[h]
        s.weight_bars[h] = 1 + kept * (s.weight_bars[h] - 1)
        ewm[_LOG_GK, h] = kept * ewm[_LOG_GK, h] + new * log_g
        ewm[_LOG_GK2, h] = kept * ewm[_LOG_GK2, h] + new * log_g * log_g
    if volume > 0:
        log_volume = log(volume)
        for h in range(_HALF_LIFE.size):
            kept, new = _DECAY[h], 1 - _DECAY[h]
            s.weight_traded[h] = 1 + kept * (s.weight_traded[h] - 1)
            ewm[_LOG_VOLUME, h] = kept * ewm[_LOG_VOLUME, h] + new * log_volume
        s.bucket_volume += _clip5(log_volume - _volume_level(s, _78))
        s.bucket_traded += 1
    s.bucket_g += g
    s.bucket_bars += 1
    return g


@njit(cache=True)
def _clip5(x):  # type: ignore[no-untyped-def]
    return min(max(x, -5.0), 5.0)


@njit(cache=True)
def _log_ratio(a, b):  # type: ignore[no-untyped-def]
    return _clip5(log((a + VARIANCE_FLOOR) / (b + VARIANCE_FLOOR)))


@njit(cache=True)
def _share(part, whole):  # type: ignore[no-untyped-def]
    return part / whole if whole > 0 else 0.0


@njit(cache=True)
def _volume_level(s, h):  # type: ignore[no-untyped-def]
    return s.ewm[_LOG_VOLUME, h] / s.weight_traded[h] if s.weight_traded[h] > 0 else 0.0


@njit(cache=True)
def _look_ahead(s, bucket, bars_left, clock, season, yesterday):  # type: ignore[no-untyped-def]
    """Mean season and mean of yesterday's g over the next bars' buckets, for each of AHEAD.

    Buckets that have never held a bar (a closed market) are stepped over. After one lap the means
    so far stand for the rest.
    """
    buckets, b = clock[_BUCKETS], bucket
    bars, sum_season, sum_yesterday, k = 0, 0.0, 0.0, 0
    for _ in range(buckets + 1):
        if s.days[b] > 0:
            while k < _AHEAD.size and bars + bars_left >= _AHEAD[k]:
                part = _AHEAD[k] - bars
                season[k] = (sum_season + part * s.season[b]) / _AHEAD[k]
                yesterday[k] = (sum_yesterday + part * s.yesterday[b]) / _AHEAD[k]
                k += 1
            if k == _AHEAD.size:
                return
            bars += bars_left
            sum_season += bars_left * s.season[b]
            sum_yesterday += bars_left * s.yesterday[b]
        bars_left = clock[_BARS_PER_BUCKET]
        b = b + 1 if b + 1 < buckets else 0
    while k < _AHEAD.size:
        season[k] = sum_season / bars if bars > 0 else 1.0
        yesterday[k] = sum_yesterday / bars if bars > 0 else _mean(s, _GK, _390)
        k += 1


@njit(cache=True)
def _write(s, out, r, g, close, volume, local, bucket, since_last, clock):  # type: ignore[no-untyped-def]
    """Write one bar's features, in the order of FEATURES."""
    j = 0
    for k in range(_WINDOW.size):
        mean = s.sum_r2[k] * RETURN2_UNIT / min(_WINDOW[k], s.step)
        out[j] = log(mean + VARIANCE_FLOOR)
        j += 1
    for h in range(_HALF_LIFE.size):
        out[j] = log(_mean(s, _GK, h) + VARIANCE_FLOOR)
        j += 1
    for h in range(_6, _390 + 1):
        out[j] = log(_mean(s, _CALM, h) + VARIANCE_FLOOR)
        j += 1
    out[j] = _log_ratio(_mean(s, _PK, _20), _mean(s, _R2, _20))
    out[j + 1] = _log_ratio(_mean(s, _RS, _20), _mean(s, _GK, _20))
    j += 2
    variance = _mean(s, _GK, _78) + VARIANCE_FLOOR
    sd = sqrt(variance)
    out[j] = r / sd
    out[j + 1] = abs(r) / sd
    out[j + 2] = log(g / variance + 0.02)
    j += 3
    for h in (_20, _78):
        out[j] = 1 - _share(s.ewm[_BIPOWER, h], s.ewm[_R2, h])
        j += 1
    for h in (_6, _20, _78):
        out[j] = _share(s.ewm[_DOWN2, h], s.ewm[_R2, h])
        j += 1
    r2 = _mean(s, _R2, _78) + VARIANCE_FLOOR
    out[j] = _clip5(_mean(s, _R3, _78) / (r2 * sqrt(r2)))
    out[j + 1] = log(_mean(s, _R4, _78) / (r2 * r2) + 0.1)
    j += 2
    for h in (_6, _20, _78):
        out[j] = _share(s.ewm[_LAG, h], s.ewm[_R2, h])
        j += 1
    for h in (_20, _78):
        log_g = s.ewm[_LOG_GK, h] / s.weight_bars[h]
        out[j] = sqrt(max(s.ewm[_LOG_GK2, h] / s.weight_bars[h] - log_g * log_g, 0.0))
        j += 1
    for h in (_6, _78, _390):
        out[j] = s.ewm[_LOG_GK, h] / s.weight_bars[h]
        j += 1
    for h in range(_2, _390 + 1):
        out[j] = _UNIT_TREND[h] * _mean(s, _R, h) / sqrt(_mean(s, _R2, h) + VARIANCE_FLOOR)
        j += 1
    for h in (_6, _20):
        out[j] = _share(s.ewm[_R, h], s.ewm[_ABS, h])
        j += 1
    out[j] = _stochastic(s, close)
    j += 1
    for fast, slow in ((_6, _20), (_20, _78)):
        lag = _PRICE_LAG[slow] * s.ewm[_R, slow] - _PRICE_LAG[fast] * s.ewm[_R, fast]
        out[j] = lag / (sd * sqrt(_HALF_LIFE[slow]))
        j += 1
    out[j] = _clip5(log(volume) - _volume_level(s, _78)) if volume > 0 else -5.0
    out[j + 1] = _clip5(_volume_level(s, _6) - _volume_level(s, _78))
    out[j + 2] = _clip5(_volume_level(s, _20) - _volume_level(s, _390))
    out[j + 3] = out[j] - s.season_volume[bucket]
    j += 4
    for h in (_20, _78):
        out[j] = _share(s.ewm[_FLOW, h], s.ewm[_VOLUME, h])
        j += 1
    season = np.empty(_AHEAD.size)
    yesterday = np.empty(_AHEAD.size)
    bars_left = (clock[_BUCKET_MS] - 1 - local % clock[_BUCKET_MS]) // clock[_INTERVAL_MS]
    _look_ahead(s, bucket, bars_left, clock, season, yesterday)
    out[j] = log(s.season[bucket] + 0.02)
    j += 1
    calm = _mean(s, _CALM, _78)
    for k in range(_AHEAD.size):
        out[j] = log(calm * season[k] + VARIANCE_FLOOR)
        j += 1
    for k in range(1, _AHEAD.size):
        out[j] = log(yesterday[k] + VARIANCE_FLOOR)
        j += 1
    angle = 2 * pi * (local % DAY_MS) / DAY_MS
    sine, cosine = sin(angle), cos(angle)
    out[j], out[j + 1] = sine, cosine
    out[j + 2], out[j + 3] = 2 * sine * cosine, 1 - 2 * sine * sine
    angle = 2 * pi * (local % WEEK_MS) / WEEK_MS
    out[j + 4], out[j + 5] = sin(angle), cos(angle)
    j += 6
    out[j] = log1p(s.session_bars)
    out[j + 1] = s.session_return / (sd * sqrt(s.session_bars))
    spread = s.session_high - s.session_low
    out[j + 2] = (s.log_close - s.session_low) / spread if spread > 0 else 0.5
    out[j + 3] = since_last
    out[j + 4] = s.gap_return
    out[j + 5] = s.gap_size
    gap2 = s.gap2 / s.gap_weight if s.gap_weight > 0 else 0.0
    out[j + 6] = log1p(gap2 / (_mean(s, _GK, _390) + VARIANCE_FLOOR))
    out[j + 7] = s.closed_time
    out[j + 8] = 1 - _mean(s, _PRESENT, _78)
    out[j + 9] = 1 - _mean(s, _MOVED, _20)
    out[j + 10] = 1 - _mean(s, _TRADED, _78)


@njit(cache=True)
def _stochastic(s, close):  # type: ignore[no-untyped-def]
    high, low = -np.inf, np.inf
    for place in range(min(s.bars_seen, _STOCHASTIC_BARS)):
        high, low = max(high, s.ring_range[place, 0]), min(low, s.ring_range[place, 1])
    return (close - low) / (high - low) if high > low else 0.5
