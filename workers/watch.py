"""One champion under watch: the statistic of its losses, and the alarm that it raises.

An alarm is open until nothing was above the threshold for `cool_down_bars`. While it is, it is raised
anew after `repeat_bars` since its beginning if things still get worse, then at twice as many bars as
the last time.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np

from models.drift import Calibration, Detector
from workers.config import MonitorSettings

PROBATION_SHARE = 0.5
"""Of the threshold, while a promoted bundle is on probation."""
TRACE_BARS = 4_000
"""Bar times of the statistic that are kept for the picture of an alarm."""


class Point(NamedTuple):
    """The statistic after one bar time."""

    ts: int
    statistic: float
    threshold: float


@dataclass(frozen=True)
class Alarm:
    """The champion is worse than its frozen reference; on probation the parent should come back."""

    bundle: str
    detector: str
    statistic: float
    """The highest since `since_ts`: an alarm that is raised again need not stand above its threshold now."""
    threshold: float
    arl0_bars: int
    since_ts: int
    ts: int
    symbols: dict[str, float]
    """Those that are worse by themselves, the worst first: mean of loss minus reference loss."""
    excess_loss: float
    """Mean of loss minus reference loss over all symbols since `since_ts`."""
    bars: int
    """Bar times since then."""
    repeats: int
    """How often this alarm has been raised before: it is open since."""
    roll_back_to: str | None


@dataclass
class _Open:
    """An alarm that was raised and is not over."""

    since_ts: int
    crossed_at: int
    """Count of pooled bar times at which the statistic last stood above its threshold."""
    again_from: int
    """Bar times since `since_ts` at which it is raised again, at the earliest."""
    repeats: int = 0
    highest: float = 0.0
    """Of the statistic since then."""


class ChampionWatch:
    """Of one term of one bundle. `weigh` each bar time, then ask whether an alarm `is_due`."""

    def __init__(
        self,
        settings: MonitorSettings,
        bundle: str,
        from_ts: int,
        parent: str | None = None,
        probation_bars: int = 0,
    ) -> None:
        """It is watched from when it has a calibration; `parent` and `probation_bars` as promoted."""
        self.bundle, self.from_ts, self.parent = bundle, from_ts, parent
        self.calibration: Calibration | None = None
        self.detector = Detector(settings.detector, np.inf)
        self.trace: deque[Point] = deque(maxlen=TRACE_BARS)
        """The statistic of late, as far as this process has seen it."""
        self._settings, self._probation_bars = settings, probation_bars
        self._pooled = 0
        """Bar times looked at."""
        self._excess, self._excess_bars = 0.0, 0
        """Of the differences since the statistic last left zero, or since an open alarm began."""
        self._open: _Open | None = None
        self._above = False
        self._ended = False
        """It is being rolled back: nothing more is said about it."""

    @property
    def alarm_is_open(self) -> bool:
        return self._open is not None

    def calibrate(self, calibration: Calibration) -> None:
        """By the wanted detector; by the CUSUM where the bundle has no threshold for it."""
        self.calibration = calibration
        name = self._settings.detector
        if calibration.threshold_of(name) is None:
            name = "cusum"
        detector = Detector(name, calibration.threshold_of(name) or np.inf, calibration.slack)
        detector.load(self.detector.export())
        self.detector = detector

    def weigh(self, ts: int, difference: float, z: float) -> None:
        """One more bar time: its mean difference, and the same pooled and standardised."""
        if self.calibration is None or self._ended:
            self._above = False
            return
        self._pooled += 1
        full = self.calibration.threshold_of(self.detector.name) or self.calibration.threshold
        self.detector.threshold = full * PROBATION_SHARE if self._is_on_probation else full
        self._above = self.detector.update(z, ts)
        drift = self.detector.get()
        self.trace.append(Point(ts, drift.statistic, self.detector.threshold))
        if drift.since_ts < 0 and self._open is None:
            self._excess, self._excess_bars = 0.0, 0
        else:
            self._excess += difference
            self._excess_bars += 1
        if self._open and self._pooled - self._open.crossed_at > self._settings.cool_down_bars:
            self._open = None
            self._excess, self._excess_bars = 0.0, 0

    @property
    def is_due(self) -> bool:
        """The statistic is above its threshold, or an open alarm's time has come and things get worse."""
        if self._above or self._open is None or self._ended:
            return self._above
        is_rising = self.detector.get().since_ts >= 0
        return is_rising and self._excess_bars >= self._open.again_from

    def alarm(self, ts: int, symbols: dict[str, float]) -> Alarm | None:
        """What is due; None where it has been said already. `symbols` are those that are worse."""
        assert self.calibration is not None
        drift, threshold = self.detector.get(), self.detector.threshold
        on_probation = self._is_on_probation
        if self._above:
            self.detector.reset()
        if (known := self._open) is not None:
            known.crossed_at = self._pooled if self._above else known.crossed_at
            if self._excess_bars < known.again_from:
                return None
            known.repeats += 1
        else:
            # Where the detector fires on a single value its CUSUM may be at zero: then since now.
            since_ts = drift.since_ts if drift.since_ts >= 0 else ts
            known = self._open = _Open(since_ts, self._pooled, 0)
        known.highest = max(known.highest, drift.statistic)
        known.again_from = max(2 * self._excess_bars, self._settings.repeat_bars)
        self._ended = on_probation
        return Alarm(
            bundle=self.bundle,
            detector=self.detector.name,
            statistic=known.highest,
            threshold=threshold,
            arl0_bars=self.calibration.arl0_bars,
            since_ts=known.since_ts,
            ts=ts,
            symbols=symbols,
            excess_loss=self._excess / max(self._excess_bars, 1),
            bars=self._excess_bars,
            repeats=known.repeats,
            roll_back_to=self.parent if on_probation else None,
        )

    def export(self) -> dict[str, Any]:
        """All but calibration and trace, as JSON values."""
        return {
            "bundle": self.bundle,
            "parent": self.parent,
            "from_ts": self.from_ts,
            "probation_bars": self._probation_bars,
            "detector": self.detector.export(),
            "pooled": self._pooled,
            "excess": self._excess,
            "excess_bars": self._excess_bars,
            "open": vars(self._open) if self._open else None,
            "ended": self._ended,
        }

    @classmethod
    def of(cls, settings: MonitorSettings, state: Mapping[str, Any]) -> Self:
        """As it was exported; it is watched once it has its calibration again."""
        watch = cls(
            settings, state["bundle"], state["from_ts"], state["parent"], state["probation_bars"]
        )
        watch.detector = Detector(state["detector"]["name"], np.inf)
        watch.detector.load(state["detector"])
        watch._pooled, watch._ended = state["pooled"], state["ended"]
        watch._excess, watch._excess_bars = state["excess"], state["excess_bars"]
        watch._open = _Open(**state["open"]) if state["open"] else None
        return watch

    @property
    def _is_on_probation(self) -> bool:
        return self.parent is not None and self._pooled <= self._probation_bars
