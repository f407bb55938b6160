"""Has a forecaster become worse than its frozen reference? Detectors with a declared false-alarm rate.

They watch d = loss - reference loss, one value per bar time pooled over symbols, standardised on
validation differences. Labels overlap, so neighbouring d are alike: every threshold is calibrated
on blocks of validation differences that keep this likeness, and no label has to be thrown away.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
from numba import njit
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DetectorName = Literal["cusum", "page_hinkley", "shiryaev_roberts", "adwin"]
DETECTORS: tuple[DetectorName, ...] = get_args(DetectorName)

SLACK = 0.25
"""k of the CUSUM, in standard deviations: drifts of more than this are accumulated."""
WINSORISED = 0.005
"""Share of the validation differences cut at each end: QLIKE has no variance worth the name."""
LIVES, LIFE_RUNS = 80, 4
"""A threshold is tried on so many bundles' lives, each of so many declared run lengths; each life
has another error of the validation mean. 320 alarms: the run length is known to some 6 %."""
ROUGH_LIVES = 20
PARTS, MOST_VARIANCE = 8, 1.0
"""Of the jackknife, and the variance of the log run length that is believed at most."""
LEAST_BLOCK_BARS = 300
"""Four half-lives of a variance that fades by 1 % a bar."""
PRIOR_BARS = 100.0
"""Weight of the validation mean in Page-Hinkley's running mean."""
ADWIN_BUCKETS, ADWIN_ROWS, ADWIN_CLOCK, ADWIN_LEAST = 5, 14, 8, 8
"""Buckets a row, rows (the last holds 2^13 values a bucket), bars between looks, least values of a part."""
MILLI = 1_000.0
"""ADWIN counts in thousandths of a standard deviation: whole numbers are short and exact in JSON."""

_CUSUM, _PAGE_HINKLEY, _SHIRYAEV_ROBERTS, _ADWIN = range(4)
_WIDTHS = (1, 5, 1, 2 + ADWIN_ROWS * (2 + ADWIN_BUCKETS))


class Calibration(BaseModel):
    """What one target's differences look like while all is well, and where the alarm stands."""

    model_config = ConfigDict(frozen=True)

    low: float | None = None
    high: float | None = None
    """Differences are cut to [low, high] before anything else; those of running losses are not."""
    mean: float
    sd: Annotated[float, Field(gt=0)]
    """Of one symbol's differences, after the cut."""
    pair_sd: float = 0.0
    """Of the mean difference over symbols and the bars of a pair."""
    correlation: Annotated[float, Field(ge=0, le=1)]
    """Of two symbols at one bar time: how little pooling more of them helps."""
    slack: float = SLACK
    threshold: Annotated[float, Field(gt=0)]
    """Of the CUSUM."""
    thresholds: dict[DetectorName, float] = {}
    """Of the other detectors."""
    symbol_scale: Annotated[float, Field(gt=0)] | None = None
    """One symbol's own CUSUM exceeds x in a share exp(-x / symbol_scale) of quiet bar times."""
    arl0_bars: Annotated[int, Field(gt=0)]
    """Declared: bar times per false alarm."""
    block_bars: Annotated[int, Field(gt=0)]
    n: int
    """Bar times it was calibrated on; fewer than `arl0_bars` means an uncertain threshold."""

    def standardise(self, differences: Floats) -> Floats:
        return (_cut(differences, self.low, self.high) - self.mean) / self.sd

    def pool(self, means: Floats, n_symbols: Ints) -> Floats:
        return pool(means, n_symbols, self.correlation)

    @property
    def scale_of_symbols(self) -> float:
        return self.symbol_scale or self.threshold / np.log(max(self.arl0_bars, 3))

    def threshold_of(self, detector: DetectorName) -> float | None:
        """None where it was not calibrated."""
        return self.threshold if detector == "cusum" else self.thresholds.get(detector)


def calibrate(
    differences: Floats,
    horizon: int,
    arl0_bars: int,
    seed: int,
    slack: float = SLACK,
    detectors: tuple[DetectorName, ...] = ("cusum",),
    pair_bars: int | None = None,
) -> Calibration:
    """Calibrate on validation differences f64[n bar times, symbols], NaN where there is none.

    `pair_bars`: that of `models.comparison` where the differences are of running losses; they are not
    winsorised, as their surprise is bounded.
    The threshold gives a detector on stationary-bootstrap resamples (Politis & Romano 1994, JASA 89)
    of the pooled series one alarm in `arl0_bars`. Raises ValueError where nothing varies.
    """
    present = np.isfinite(differences)
    differences = differences[present.any(axis=1)]
    present = np.isfinite(differences)
    low, high = None, None
    if pair_bars is None:
        low, high = np.quantile(differences[present], [WINSORISED, 1 - WINSORISED]).tolist()
    cut = _cut(differences, low, high)
    mean, sd = float(np.mean(np.nanmean(cut, axis=1))), float(np.std(cut[present]))
    if not sd > 0:
        raise ValueError("the validation differences do not vary: nothing to calibrate on")
    n_symbols = present.sum(axis=1)
    z = (cut - mean) / sd
    means = np.nanmean(z, axis=1)
    correlation = _correlation(means, n_symbols)
    pooled = pool(means, n_symbols, correlation)
    pooled -= pooled.mean()
    block = block_length(pooled, horizon)
    thresholds = {
        name: threshold_for(name, pooled, block, arl0_bars, slack, seed)
        for name in dict.fromkeys(("cusum", *detectors))
    }
    return Calibration(
        low=low,
        high=high,
        mean=mean,
        sd=sd,
        pair_sd=_pair_sd(np.nanmean(cut, axis=1), pair_bars or 1),
        correlation=correlation,
        slack=slack,
        threshold=thresholds.pop("cusum"),
        thresholds=thresholds,
        symbol_scale=_symbol_scale(z, slack),
        arl0_bars=arl0_bars,
        block_bars=block,
        n=len(pooled),
    )


def pool(means: Floats, n_symbols: Ints, correlation: float) -> Floats:
    """Means over n symbols of standardised differences, brought to unit variance.

    Var of a mean of n equally correlated values: rho + (1 - rho) / n (Kish's design effect).
    """
    return np.asarray(means / np.sqrt(correlation + (1 - correlation) / n_symbols))


def block_length(series: Floats, horizon: int) -> int:
    """Twice the lag from which autocorrelation is no longer seen, at least ten horizons.

    Of the values and of their sizes: calm and wild times last far longer than labels overlap, and
    alarms come in the wild ones. Blocks of two horizons cut so many overlaps that alarms came 1.5
    times too often, blocks shorter than `LEAST_BLOCK_BARS` so many wild times. At most n // 20.
    """
    lag = max(_quiet_lag(series), _quiet_lag(np.abs(series)))
    return int(max(1, min(max(2 * lag, 10 * horizon, LEAST_BLOCK_BARS), len(series) // 20)))


def _quiet_lag(series: Floats) -> int:
    """The smallest m after which max(5, sqrt(log10 n)) autocorrelations in a row stay within
    2 sqrt(log10(n) / n) (Politis & White 2004, Econometric Reviews 23).
    """
    n = len(series)
    centred = series - series.mean()
    spectrum = np.fft.rfft(centred, 2 * n)
    autocovariance = np.fft.irfft(np.abs(spectrum) ** 2)[:n]
    correlations = np.abs(autocovariance[1:] / max(autocovariance[0], 1e-300))
    quiet = correlations < 2 * np.sqrt(np.log10(n) / n)
    in_a_row = max(5, int(np.sqrt(np.log10(n))))
    runs = np.convolve(quiet, np.ones(in_a_row, int), mode="valid") == in_a_row
    return int(np.argmax(runs)) if runs.any() else n


def standard_error(series: Floats, block: int) -> float:
    """Of the mean of a dependent series, from its overlapping blocks (Kuensch 1989, Ann. Stat. 17)."""
    sums = np.cumsum(np.concatenate([[0.0], series]))
    block_means = (sums[block:] - sums[:-block]) / block
    return float(np.sqrt(np.var(block_means) * block / len(series)))


def threshold_for(
    detector: DetectorName, series: Floats, block: int, arl0_bars: int, slack: float, seed: int
) -> float:
    """The threshold at which a detector on resampled `series` (mean 0) alarms once in `arl0_bars`.

    The validation mean is known to a standard error only, and a false alarm is a matter of a small
    difference of means: so each simulated life is shifted by another draw of that error, and the
    rate is that over all lives.

    How many storms there are among so few bars is an accident too. Thresholds that it makes too low
    cost more alarms than those too high spare: exp(v / 2) times as many over all bundles, where v is the
    variance of the log of the run length. So that many times the run length is aimed at; v is the
    jackknife's, by parts of the series.
    """
    kind, error = DETECTORS.index(detector), standard_error(series, block)

    def log_run_length(threshold: float, lives: int, bars: Floats = series) -> float:
        rng, life = np.random.default_rng(seed), LIFE_RUNS * arl0_bars
        shifts = error * _normal_quantiles(lives)
        state = np.zeros(_WIDTHS[kind])
        alarms = _alarms(kind, state, bars, block, slack, threshold, life, shifts, rng)
        return float(np.log(life * lives / max(alarms, 0.5)))

    wanted, low, high = np.log(arl0_bars), 0.0, 1.0
    while log_run_length(high, ROUGH_LIVES) < wanted:
        low, high = high, 2 * high
    while high - low > 0.1 * high:
        middle = (low + high) / 2
        low, high = (
            (middle, high) if log_run_length(middle, ROUGH_LIVES) < wanted else (low, middle)
        )
    # The logarithm of the run length is all but linear in the threshold.
    low, high = 0.95 * low, 1.05 * high
    at_low, at_high = log_run_length(low, LIVES), log_run_length(high, LIVES)
    without = [log_run_length(high, ROUGH_LIVES, bars) for bars in _without_each_part(series)]
    wanted += min((PARTS - 1) * float(np.var(without)), MOST_VARIANCE) / 2
    if not at_high > at_low:
        return high
    return float(max(low + (wanted - at_low) / (at_high - at_low) * (high - low), low / 2))


def _without_each_part(series: Floats) -> list[Floats]:
    """The series, its mean 0, without one of `PARTS` equal parts."""
    parts = np.array_split(np.arange(len(series)), PARTS)
    left = [np.delete(series, part) for part in parts]
    return [each - each.mean() for each in left]


class Drift(NamedTuple):
    statistic: float
    since_ts: int
    """Change-point estimate: where the CUSUM last left zero (Page 1954), -1 while it is there."""


class Detector:
    """One detector on one series: `update get reset`, and `export load` of its whole state.

    - `cusum` (Page 1954): S = max(0, S + z - k).
    - `page_hinkley` (Hinkley 1971): the same about the running mean of what was seen.
    - `shiryaev_roberts` (Shiryaev 1963; Roberts 1966; an e-detector where its factors are e-values:
      Shin, Ramdas & Rinaldo 2024): R = (1 + R) exp(2k z - 2k^2); the statistic is log(1 + R).
    - `adwin` (Bifet & Gavalda 2007): the largest rise of the mean at any cut of a growing window,
      kept as an exponential histogram; the old part goes when the mean has fallen as much.

    Written here: river's keep no state that fits into the metadata of an offset, and their
    thresholds declare no run length.
    """

    def __init__(self, name: DetectorName, threshold: float, slack: float = SLACK) -> None:
        self.name, self.threshold, self.slack = name, threshold, slack
        self._kind = DETECTORS.index(name)
        self.reset()

    def reset(self) -> None:
        self._state = np.zeros(_WIDTHS[self._kind])
        self._sum, self._since_ts = 0.0, -1

    def update(self, z: float, ts: int) -> bool:
        """Take one standardised value; whether the statistic stands above its threshold."""
        moved = self._sum + z - self.slack
        if moved <= 0:
            self._sum, self._since_ts = 0.0, -1
        else:
            self._since_ts = ts if self._sum == 0 else self._since_ts
            self._sum = moved
        return bool(_step(self._kind, self._state, z, self.slack, self.threshold) > self.threshold)

    def get(self) -> Drift:
        return Drift(float(self._state[0]), self._since_ts)

    def export(self) -> dict[str, Any]:
        """As JSON values, a few hundred bytes."""
        kept = np.trim_zeros(self._state, "b").tolist()
        state = [int(value) if value.is_integer() else value for value in kept]
        return {"name": self.name, "state": state, "sum": self._sum, "since_ts": self._since_ts}

    def load(self, exported: Mapping[str, Any]) -> None:
        """Put back what `export` gave; the state of another detector starts anew."""
        self.reset()
        if exported["name"] == self.name:
            self._state[: len(exported["state"])] = exported["state"]
            self._sum, self._since_ts = exported["sum"], exported["since_ts"]


def alarms_in(
    detector: DetectorName, z: Floats, threshold: float, slack: float, quiet: int
) -> Ints:
    """Places in z at which a detector would alarm, if it began anew `quiet` values after each alarm."""
    kind = DETECTORS.index(detector)
    return np.asarray(_places(kind, np.zeros(_WIDTHS[kind]), z, slack, threshold, quiet))


def passing(p_values: Floats, false_share: float) -> NDArray[np.bool_]:
    """Which of many are real: at most `false_share` of those named are expected to be false.

    Benjamini & Hochberg 1995 (JRSS-B 57); it holds under the positive dependence of symbols that
    fall together (Benjamini & Yekutieli 2001).
    """
    n = len(p_values)
    order = np.argsort(p_values)
    below = np.flatnonzero(p_values[order] <= false_share * np.arange(1, n + 1) / n)
    named = np.zeros(n, np.bool_)
    named[order[: below[-1] + 1 if len(below) else 0]] = True
    return named


def _cut(differences: Floats, low: float | None, high: float | None) -> Floats:
    return differences if low is None else np.clip(differences, low, high)


def _pair_sd(means: Floats, pair_bars: int) -> float:
    whole = len(means) // pair_bars * pair_bars
    return float(np.std(means[:whole].reshape(-1, pair_bars).mean(axis=1)))


def _symbol_scale(z: Floats, slack: float) -> float:
    """Decay of the tail of single symbols' CUSUMs over the validation part (exponential in theory).

    From the 90 % and the 99 % quantile, whichever says that large values are more usual.
    """
    statistic, seen = np.zeros(z.shape[1]), np.empty(z.shape)
    for t, row in enumerate(np.where(np.isfinite(z), z, 0.0)):
        statistic = np.maximum(statistic + row - slack, 0.0)
        seen[t] = statistic
    shares = np.array([0.1, 0.01])
    return float(max(np.max(np.quantile(seen, 1 - shares) / -np.log(shares)), 1e-3))


def _normal_quantiles(n: int) -> Floats:
    """N equally likely standard normal values: medians of the n-tiles, scaled to unit variance."""
    draws = np.sort(np.random.default_rng(0).standard_normal(1_000 * n)).reshape(n, 1_000)
    quantiles = np.median(draws, axis=1)
    return np.asarray(quantiles / np.sqrt(np.mean(quantiles**2)))


def _correlation(means: Floats, n_symbols: Ints) -> float:
    """Mean pairwise correlation, from Var(mean of n) = rho + (1 - rho) / n by least squares."""
    share = 1.0 / n_symbols
    several = n_symbols > 1
    if not several.any():
        return 1.0
    excess = means[several] ** 2 - share[several]
    room = 1.0 - share[several]
    return float(np.clip(np.dot(excess, room) / np.dot(room, room), 0.0, 1.0))


@njit(cache=True)
def _step(kind, s, z, slack, threshold):  # type: ignore[no-untyped-def]
    """The statistic after one more value; s[0] is it, the rest is the detector's own."""
    if kind == _CUSUM:
        s[0] = max(0.0, s[0] + z - slack)
    elif kind == _PAGE_HINKLEY:
        s[1] += 1.0
        s[2] += (z - s[2]) / (PRIOR_BARS + s[1])
        s[3] += z - s[2] - slack
        s[4] = min(s[4], s[3])
        s[0] = s[3] - s[4]
    elif kind == _SHIRYAEV_ROBERTS:
        x = s[0] + 2.0 * slack * (z - slack)
        s[0] = max(x, 0.0) + np.log1p(np.exp(-abs(x)))
    else:
        _adwin(s, np.rint(z * MILLI), threshold)
    return s[0]


@njit(cache=True)
def _adwin(s, z, threshold):  # type: ignore[no-untyped-def]
    """s[1] counts bars; then each row has its number of buckets and their sums, oldest first."""
    width = ADWIN_BUCKETS + 2
    s[1] += 1.0
    carried = z
    for row in range(ADWIN_ROWS):
        at = 2 + row * width
        n = int(s[at])
        s[at + 1 + n] = carried
        s[at] = n + 1
        if n < ADWIN_BUCKETS:
            break
        carried = s[at + 1] + s[at + 2]  # past the last row it is forgotten
        for i in range(n - 1):
            s[at + 1 + i] = s[at + 3 + i]
        s[at + n], s[at + n + 1] = 0.0, 0.0
        s[at] = n - 1
    if int(s[1]) % ADWIN_CLOCK:
        return
    total_n, total = 0.0, 0.0
    for row in range(ADWIN_ROWS):
        at = 2 + row * width
        total_n += s[at] * 2.0**row
        for i in range(int(s[at])):
            total += s[at + 1 + i]
    rise, fall, new_n, new = 0.0, 0.0, 0.0, 0.0
    oldest = 0
    for row in range(ADWIN_ROWS):
        at = 2 + row * width
        for i in range(int(s[at]) - 1, -1, -1):
            oldest = row
            new_n += 2.0**row
            new += s[at + 1 + i]
            old_n = total_n - new_n
            if new_n < ADWIN_LEAST or old_n < ADWIN_LEAST:
                continue
            moved = new / new_n - (total - new) / old_n
            shift = moved * np.sqrt(new_n * old_n / total_n) / MILLI
            rise, fall = max(rise, shift), max(fall, -shift)
    s[0] = rise
    if fall > threshold:
        at = 2 + oldest * width
        n = int(s[at])
        for i in range(n - 1):
            s[at + 1 + i] = s[at + 2 + i]
        s[at + n] = 0.0
        s[at] = n - 1


@njit(cache=True)
def _alarms(kind, s, series, block, slack, threshold, life, shifts, rng):  # type: ignore[no-untyped-def]
    """Alarms over resampled lives of `life` steps; after each the detector starts anew elsewhere."""
    n, alarms = len(series), 0
    for shift in shifts:
        s[:] = 0.0
        place = rng.integers(0, n)
        for _ in range(life):
            if _step(kind, s, series[place] - shift, slack, threshold) > threshold:
                alarms += 1
                s[:] = 0.0
                place = rng.integers(0, n)
            place = rng.integers(0, n) if rng.random() * block < 1.0 else (place + 1) % n
    return alarms


@njit(cache=True)
def _places(kind, s, z, slack, threshold, quiet):  # type: ignore[no-untyped-def]
    found, n, t = np.empty(len(z), np.int64), 0, 0
    while t < len(z):
        if _step(kind, s, z[t], slack, threshold) > threshold:
            found[n] = t
            n += 1
            s[:] = 0.0
            t += quiet
        t += 1
    return found[:n]
