"""The features again, from their formulas, slowly and without state: what the kernel must agree with."""

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from models.features import AHEAD, HALF_LIVES, WINDOWS, FeatureSpec

FLOOR = 1e-12
DAY_MS = 86_400_000


def naive_features(
    spec: FeatureSpec, ts: NDArray[np.int64], ohlcv: NDArray[np.float64]
) -> pd.DataFrame:
    """One row a bar, one column a feature; for bars of one symbol without a reset between them."""
    n = len(ts)
    _, high, low, close, volume = ohlcv.T
    lo, lh, ll, lc = np.log(ohlcv[:, :4].T)
    gap_steps = np.round(np.diff(ts) / spec.interval_ms).astype(int)
    breaks = np.concatenate([[True], gap_steps > spec.max_fill + 1])
    steps = np.where(breaks, 1, np.concatenate([[1], gap_steps]))
    place = np.cumsum(steps)
    before = np.where(breaks, lo, np.concatenate([[0.0], lc[:-1]]))
    r = lc - before
    r_lag = np.where(breaks | (steps > 1), 0.0, np.concatenate([[0.0], r[:-1]]))
    up, down, body, jump = lh - lo, ll - lo, lc - lo, lo - before
    g = 0.5 * (up - down) ** 2 - (2 * math.log(2) - 1) * body**2 + jump**2
    with np.errstate(invalid="ignore", divide="ignore"):
        flow = np.where(up > down, (2 * lc - lh - ll) / (up - down), 0.0)
        log_volume = np.log(volume)

    def ewm(x: NDArray[np.float64], half_life: int) -> NDArray[np.float64]:
        decay = 0.5 ** (1 / half_life)
        distance = place[:, None] - place[None, :]
        weight = np.where(distance >= 0, decay ** np.maximum(distance, 0), 0.0)
        total = (1 - decay**place) / (1 - decay)
        return np.asarray(weight @ x / total)

    def ewm_bars(x: NDArray[np.float64], half_life: int) -> NDArray[np.float64]:
        """Over the bars where x is a number."""
        return (
            pd.Series(x).ewm(halflife=half_life, ignore_na=True).mean().ffill().fillna(0).to_numpy()
        )

    def window(w: int) -> NDArray[np.float64]:
        sums = [(r[(place > p - w) & (place <= p)] ** 2).sum() / min(w, p) for p in place]
        return np.array(sums)

    local = pd.DatetimeIndex(pd.to_datetime(ts, unit="ms", utc=True)).tz_convert(spec.timezone)
    of_day = (local.hour * 60 + local.minute).to_numpy() * 60_000
    days = local.tz_localize(None).normalize().to_numpy()
    bucket_ms = spec.interval_ms * math.ceil(300_000 / spec.interval_ms)
    bucket = of_day // bucket_ms
    g_390 = ewm(g, 390)
    s2 = ewm(g, 78) + FLOOR
    level = {h: ewm_bars(np.where(volume > 0, log_volume, np.nan), h) for h in HALF_LIVES}
    f: dict[str, NDArray[np.float64]] = {}

    season = np.ones(DAY_MS // bucket_ms)
    season_volume = np.zeros(len(season))
    yesterday = np.zeros(len(season))
    seen = np.zeros(len(season), dtype=int)
    season_at, season_volume_at = np.ones(n), np.zeros(n)
    ahead = np.ones((n, len(AHEAD)))
    day_before = np.zeros((n, len(AHEAD)))
    first = 0
    for i in range(n):
        if i and (bucket[i] != bucket[first] or days[i] != days[first]):
            b, rows = bucket[first], slice(first, i)
            rate = max(1 / (seen[b] + 3), 1 / 30)
            season[b] += rate * (min(g[rows].mean() / (g_390[i - 1] + FLOOR), 20) - season[b])
            traded = volume[rows] > 0
            if traded.any():
                surprise = (log_volume[rows] - level[78][rows])[traded].mean()
                season_volume[b] += rate * (surprise - season_volume[b])
            yesterday[b] = g[rows].mean()
            seen[b] += 1
            first = i
        season_at[i], season_volume_at[i] = season[bucket[i]], season_volume[bucket[i]]
        lap = np.arange(1, DAY_MS // spec.interval_ms + 1)
        later = (of_day[i] + lap * spec.interval_ms) % DAY_MS // bucket_ms
        open_later = later[seen[later] > 0]
        for k, count in enumerate(AHEAD):
            ahead[i, k] = season[open_later[:count]].mean() if len(open_later) else 1.0
            day_before[i, k] = yesterday[open_later[:count]].mean() if len(open_later) else g_390[i]

    for w in WINDOWS:
        f[f"log_rv_{w}"] = np.log(window(w) + FLOOR)
    for h in HALF_LIVES:
        f[f"log_gk_hl{h}"] = np.log(ewm(g, h) + FLOOR)
    for h in (6, 20, 78, 390):
        f[f"log_calm_hl{h}"] = np.log(ewm(g / (season_at + 0.02), h) + FLOOR)
    parkinson = (up - down) ** 2 / (4 * math.log(2))
    rogers = up * (up - body) + down * (down - body)
    f["parkinson_ratio_hl20"] = np.log((ewm(parkinson, 20) + FLOOR) / (ewm(r**2, 20) + FLOOR))
    f["rogers_satchell_ratio_hl20"] = np.log((ewm(rogers, 20) + FLOOR) / (ewm(g, 20) + FLOOR))
    f["return_1"] = r / np.sqrt(s2)
    f["abs_return_1"] = np.abs(r) / np.sqrt(s2)
    f["log_range_1"] = np.log(g / s2 + 0.02)
    for h in (20, 78):
        f[f"jump_share_hl{h}"] = 1 - math.pi / 2 * ewm(np.abs(r * r_lag), h) / ewm(r**2, h)
    for h in (6, 20, 78):
        f[f"downside_share_hl{h}"] = ewm(np.minimum(r, 0) ** 2, h) / ewm(r**2, h)
        f[f"autocorrelation_hl{h}"] = ewm(r * r_lag, h) / ewm(r**2, h)
    r2 = ewm(r**2, 78) + FLOOR
    f["skewness_hl78"] = np.clip(ewm(r**3, 78) / r2**1.5, -5, 5)
    f["log_kurtosis_hl78"] = np.log(ewm(r**4, 78) / r2**2 + 0.1)
    log_g = np.log(g + 0.02 * ewm(g, 78) + FLOOR)
    for h in (20, 78):
        spread = ewm_bars(log_g**2, h) - ewm_bars(log_g, h) ** 2
        f[f"vol_of_vol_hl{h}"] = np.sqrt(np.maximum(spread, 0))
    for h in (6, 78, 390):
        f[f"log_mean_hl{h}"] = ewm_bars(log_g, h)
    for h in (2, 6, 20, 78, 390):
        decay = 0.5 ** (1 / h)
        unit = math.sqrt((1 + decay) / (1 - decay))
        f[f"trend_hl{h}"] = unit * ewm(r, h) / np.sqrt(ewm(r**2, h) + FLOOR)
    for h in (6, 20):
        f[f"rsi_hl{h}"] = ewm(r, h) / ewm(np.abs(r), h)
    top = pd.Series(high).rolling(14, min_periods=1).max().to_numpy()
    bottom = pd.Series(low).rolling(14, min_periods=1).min().to_numpy()
    f["stochastic_14"] = (close - bottom) / (top - bottom)

    filled = np.zeros(place[-1])
    filled[place - 1] = r
    path = np.cumsum(filled)
    for fast, slow in ((6, 20), (20, 78)):
        mean = {}
        for h in (fast, slow):
            # The path starts at 0, where it has been for ever.
            decay, m = 0.5 ** (1 / h), 0.0
            values = []
            for p in path:
                m = decay * m + (1 - decay) * p
                values.append(m)
            mean[h] = np.array(values)[place - 1]
        f[f"macd_{fast}_{slow}"] = (mean[fast] - mean[slow]) / np.sqrt(s2 * slow)

    f["volume_1"] = np.clip(np.where(volume > 0, log_volume - level[78], -5), -5, 5)
    f["volume_6_78"] = level[6] - level[78]
    f["volume_20_390"] = level[20] - level[390]
    f["volume_season_1"] = f["volume_1"] - season_volume_at
    for h in (20, 78):
        f[f"money_flow_hl{h}"] = ewm(flow * volume, h) / ewm(volume, h)
    f["season_now"] = np.log(season_at + 0.02)
    calm = ewm(g / (season_at + 0.02), 78)
    for k, count in enumerate(AHEAD):
        f[f"expected_{count}"] = np.log(calm * ahead[:, k] + FLOOR)
        if count > 1:
            f[f"yesterday_{count}"] = np.log(day_before[:, k] + FLOOR)
    for harmonic in (1, 2):
        angle = 2 * math.pi * harmonic * of_day / DAY_MS
        f[f"day_sin_{harmonic}"], f[f"day_cos_{harmonic}"] = np.sin(angle), np.cos(angle)
    # The week is counted from Thursday, as the epoch is.
    angle = 2 * math.pi * ((local.day_of_week.to_numpy() + 4) % 7 + of_day / DAY_MS) / 7
    f["week_sin"], f["week_cos"] = np.sin(angle), np.cos(angle)

    opens = breaks | np.concatenate([[True], days[1:] != days[:-1]])
    session = np.cumsum(opens)
    by_session = pd.DataFrame({"steps": steps, "r": r, "h": lh, "l": ll}).groupby(session)
    bars = by_session["steps"].cumsum().to_numpy()
    f["bars_since_open"] = np.log1p(bars)
    f["session_return"] = by_session["r"].cumsum().to_numpy() / np.sqrt(s2 * bars)
    top, bottom = by_session["h"].cummax().to_numpy(), by_session["l"].cummin().to_numpy()
    f["session_position"] = (lc - bottom) / (top - bottom)
    f["time_since_last"] = np.concatenate([[0.0], np.log(np.diff(ts) / spec.interval_ms)])
    gap_return, gap_size, gap_variance, closed = np.zeros((4, n))
    gaps: list[float] = []
    for i in range(1, n):
        if breaks[i]:
            gaps.append(lo[i] - lc[i - 1])
            sd = math.sqrt(s2[i - 1])
            gap_return[i] = np.clip(gaps[-1] / sd / math.sqrt(78), -8, 8)
            gap_size[i] = math.log1p(abs(gaps[-1]) / sd)
            closed[i] = math.log1p((ts[i] - ts[i - 1]) / 3_600_000)
        else:
            gap_return[i], gap_size[i], closed[i] = (
                gap_return[i - 1],
                gap_size[i - 1],
                closed[i - 1],
            )
        if gaps:
            weight = 0.5 ** (np.arange(len(gaps))[::-1] / 10)
            gap_variance[i] = np.average(np.square(gaps), weights=weight)
    f["gap_return"], f["gap_size"], f["closed_time"] = gap_return, gap_size, closed
    f["log_gap_variance"] = np.log1p(gap_variance / (g_390 + FLOOR))
    f["absent_share_hl78"] = 1 - ewm(np.ones(n), 78)
    f["zero_return_share_hl20"] = 1 - ewm((r != 0).astype(float), 20)
    f["zero_volume_share_hl78"] = 1 - ewm((volume > 0).astype(float), 78)
    return pd.DataFrame(f)
