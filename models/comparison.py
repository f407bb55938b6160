"""Is the challenger better than the champion? A paired test that may be looked at after every bar.

Betting on the loss differences (Waudby-Smith & Ramdas 2024, JRSS-B 86; for forecasters Choe &
Ramdas 2024, Operations Research 72): while the challenger is no better, nobody can expect to make
money by betting that it is, so the chance that the wealth ever reaches 1/alpha is at most alpha
(Ville 1939). Written here because the library of that field needs a compiler and saw its last
release in 2023.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

BETS, BOLD = 0.9 * np.exp2(-np.arange(8.0)), 4
"""Fractions staked; the wealth is the mean over them, so none has to be tuned. All are staked by the
running scale, the root mean square of past differences, which sees small gains; so many of them by
the usual one too, by which differences vary while all is well, or the greatest loss so far where that
is more: a gain far beyond the usual wins after ten pairs. Half of the wealth is in either."""
GAIN_LIMIT, RUIN = 3.0, 3.0
"""In scales. Losses are heavy-tailed: a gain is
cut at its limit, which can only cost power; a loss is never cut, one of `RUIN` / 0.9 scales takes
all that the boldest bet has won. The smaller `RUIN`, the sooner a clear gain is seen (a constant one
after 25 bets at alpha 0.0125, 47 at `RUIN` 6) and the less a rare great loss counts: of challengers no better,
170 pairs long, 0.05 to 0.35 alpha are promoted where differences are normal, t3 or exponential,
0.9 to 1.3 alpha where losses are lognormal. What no test can see is a failure too rare to have
happened yet: against that stands the probation after a promotion."""
CAUTION = 2.0
"""So many times 1 / alpha is the wealth that decides. Forecasts err in the same way for longer than one
pair lasts, which a bettor who follows them can use though neither is better in the long run: with
errors that halve in 34 bars and pairs of 30, 0.04 of challengers no better reached 1 / alpha = 20, and
0.02 twice that (tests/benchmarks/quality-loop.md)."""
RICH = 1e300
"""Wealth beyond it is not counted: it only has to stay finite."""
OPENING_PAIRS = 4
"""Pairs that only set the scale; no bet is placed on them."""

SIDES = ("better", "worse")

Verdict = Literal["promote", "refuse", "continue"]


class Rule(BaseModel):
    """When to stop: `max_bars` counts pooled bar times seen, bet upon or not."""

    model_config = ConfigDict(frozen=True)

    alpha: float = Field(0.05, gt=0, lt=1)
    """Chance at most that a challenger no better than the champion is ever promoted."""
    max_bars: int = Field(20_000, gt=0)


class Evidence(NamedTuple):
    verdict: Verdict
    e_better: float
    """Wealth of betting that the challenger is better; `CAUTION`/alpha promotes."""
    e_worse: float
    pairs: int
    """Non-overlapping pairs bet upon."""
    bars: int
    mean_gain: float
    """Mean of champion loss minus challenger loss over all bars."""


class Comparison:
    """Champion against challenger on the same bars: `update get`, one pooled difference a bar time.

    A bet may only be placed once the last one is settled. Where labels overlap, the next pair
    taken is the first whose bar is not before the maturity of the one before: about every
    horizon-th bar. Where they do not, `pair_bars` bar times in a row make a pair, by the mean of
    their gains: forecasts err in the same way for a while, so each bar by itself is no new evidence.
    The scale of a bet is set by earlier pairs only.
    """

    def __init__(
        self, rule: Rule, least_scale: float = 0.0, usual_scale: float = 0.0, pair_bars: int = 1
    ) -> None:
        """`least_scale`: differences smaller than this are never magnified by the bets.

        `usual_scale`: by which a pair's differences vary while all is well, 0 where nobody knows.
        """
        self.rule, self.least_scale, self.usual_scale = rule, least_scale, usual_scale
        self._pair_bars = pair_bars
        self._wealth = {side: np.ones(len(BETS) + BOLD) for side in SIDES}
        """Of the bets by the running scale, then of those by the usual one."""
        self._greatest = dict.fromkeys(SIDES, 0.0)
        """Loss of a pair so far, of who bets on that side."""
        self._squares = 0.0
        self._pairs = 0
        self._bars = 0
        self._gain = 0.0
        self._settled_ts = -1
        self._open = [0.0, 0]
        """Sum and number of the gains of a pair that is not complete."""

    def update(self, ts: int, matured_ts: int, gain: float) -> bool:
        """`gain`: champion loss minus challenger loss at bar `ts`, known at `matured_ts`.

        Whether the verdict may have changed.
        """
        self._bars += 1
        self._gain += gain
        if ts >= self._settled_ts:
            self._settled_ts = matured_ts
            self._open = [self._open[0] + gain, self._open[1] + 1]
        complete = self._open[1] == self._pair_bars
        if complete:
            self._bet(self._open[0] / self._pair_bars)
            self._open = [0.0, 0]
        return complete or self._bars >= self.rule.max_bars

    def get(self) -> Evidence:
        better, worse = (self._worth(self._wealth[side]) for side in SIDES)
        needed = CAUTION / self.rule.alpha
        verdict: Verdict = "continue"
        if better >= needed:
            verdict = "promote"
        elif worse >= needed or self._bars >= self.rule.max_bars:
            verdict = "refuse"
        pairs = self._pairs if self.usual_scale else max(self._pairs - OPENING_PAIRS, 0)
        return Evidence(verdict, better, worse, pairs, self._bars, self._gain / max(self._bars, 1))

    def export(self) -> dict[str, Any]:
        """Everything but the rule, as JSON values."""
        return {
            "better": self._wealth["better"].tolist(),
            "worse": self._wealth["worse"].tolist(),
            "greatest": list(self._greatest.values()),
            "squares": self._squares,
            "pairs": self._pairs,
            "bars": self._bars,
            "gain": self._gain,
            "settled_ts": self._settled_ts,
            "open": self._open,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self._wealth = {side: np.array(state[side]) for side in SIDES}
        self._greatest = dict(zip(SIDES, state["greatest"], strict=True))
        self._squares, self._gain = state["squares"], state["gain"]
        self._pairs, self._bars = state["pairs"], state["bars"]
        self._settled_ts, self._open = state["settled_ts"], list(state["open"])

    def _worth(self, wealth: NDArray[np.float64]) -> float:
        own, usual = wealth[: len(BETS)].mean(), wealth[len(BETS) :].mean()
        return float((own + usual) / 2 if self.usual_scale else own)

    def _bet(self, gain: float) -> None:
        scale = max((self._squares / max(self._pairs, 1)) ** 0.5, self.least_scale)
        opening = self._pairs < OPENING_PAIRS
        for side, won in zip(SIDES, (gain, -gain), strict=True):
            usual = max(self.usual_scale, self._greatest[side]) if self.usual_scale else 0.0
            odds = _odds(won, 0.0 if opening else scale), _odds(won, usual)[:BOLD]
            self._wealth[side] = np.minimum(self._wealth[side] * np.concatenate(odds), RICH)
            self._greatest[side] = max(self._greatest[side], -won)
        # Cut before it enters the scale: one false print must not silence the test for good.
        cut = min(abs(gain), 10.0 * scale) if scale > 0 and not opening else abs(gain)
        self._squares += cut * cut
        self._pairs += 1


def _odds(won: float, scale: float) -> NDArray[np.float64]:
    """What each bet is worth after a pair; no bet is placed by a scale of 0."""
    if scale == 0:
        return np.ones(len(BETS))
    return np.asarray(np.maximum(1.0 + BETS * min(won / scale, GAIN_LIMIT) / RUIN, 0.0))
