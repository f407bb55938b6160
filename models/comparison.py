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
from pydantic import BaseModel, ConfigDict, Field

BETS = 0.9 * np.exp2(-np.arange(8.0))
"""Fractions staked; the wealth is the mean over them, so none has to be tuned."""
GAIN_LIMIT, RUIN = 3.0, 3.0
"""In scales, the running root mean square of past differences. Losses are heavy-tailed: a gain is
cut at its limit, which can only cost power; a loss is never cut, one of `RUIN` / 0.9 scales takes
all that the boldest bet has won. The smaller `RUIN`, the sooner a clear gain is seen (a constant one
after 25 bets at alpha 0.0125, 47 at `RUIN` 6) and the less a rare great loss counts: of challengers no better,
170 pairs long, 0.05 to 0.35 alpha are promoted where differences are normal, t3 or exponential,
0.9 to 1.3 alpha where losses are lognormal. What no test can see is a failure too rare to have
happened yet: against that stands the probation after a promotion."""
RICH = 1e300
"""Wealth beyond it is not counted: it only has to stay finite."""
OPENING_PAIRS = 4
"""Pairs that only set the scale; no bet is placed on them."""

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
    """Wealth of betting that the challenger is better; 1/alpha promotes."""
    e_worse: float
    pairs: int
    """Non-overlapping pairs bet upon."""
    bars: int
    mean_gain: float
    """Mean of champion loss minus challenger loss over all bars."""


class Comparison:
    """Champion against challenger on the same bars: `update get`, one pooled difference a bar time.

    Labels overlap, and a bet may only be placed once the last one is settled. So the next pair
    taken is the first whose bar is not before the maturity of the one before: about every
    horizon-th bar. The scale of a bet is set by earlier pairs only.
    """

    def __init__(self, rule: Rule, least_scale: float = 0.0) -> None:
        """`least_scale`: differences smaller than this are never magnified by the bets."""
        self.rule, self.least_scale = rule, least_scale
        self._wealth = {"better": np.ones(len(BETS)), "worse": np.ones(len(BETS))}
        self._squares = 0.0
        self._pairs = 0
        self._bars = 0
        self._gain = 0.0
        self._settled_ts = -1

    def update(self, ts: int, matured_ts: int, gain: float) -> bool:
        """`gain`: champion loss minus challenger loss at bar `ts`, known at `matured_ts`.

        Whether the verdict may have changed.
        """
        self._bars += 1
        self._gain += gain
        taken = ts >= self._settled_ts
        if taken:
            self._settled_ts = matured_ts
            self._bet(gain)
        return taken or self._bars >= self.rule.max_bars

    def get(self) -> Evidence:
        better, worse = (float(wealth.mean()) for wealth in self._wealth.values())
        needed = 1.0 / self.rule.alpha
        verdict: Verdict = "continue"
        if better >= needed:
            verdict = "promote"
        elif worse >= needed or self._bars >= self.rule.max_bars:
            verdict = "refuse"
        pairs = max(self._pairs - OPENING_PAIRS, 0)
        return Evidence(verdict, better, worse, pairs, self._bars, self._gain / max(self._bars, 1))

    def export(self) -> dict[str, Any]:
        """Everything but the rule, as JSON values."""
        return {
            "better": self._wealth["better"].tolist(),
            "worse": self._wealth["worse"].tolist(),
            "squares": self._squares,
            "pairs": self._pairs,
            "bars": self._bars,
            "gain": self._gain,
            "settled_ts": self._settled_ts,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self._wealth = {side: np.array(state[side]) for side in ("better", "worse")}
        self._squares, self._gain = state["squares"], state["gain"]
        self._pairs, self._bars = state["pairs"], state["bars"]
        self._settled_ts = state["settled_ts"]

    def _bet(self, gain: float) -> None:
        scale = max((self._squares / max(self._pairs, 1)) ** 0.5, self.least_scale)
        opening = self._pairs < OPENING_PAIRS
        if not opening and scale > 0:
            for side, sign in (("better", 1.0), ("worse", -1.0)):
                odds = 1.0 + BETS * min(sign * gain / scale, GAIN_LIMIT) / RUIN
                self._wealth[side] = np.minimum(self._wealth[side] * np.maximum(odds, 0.0), RICH)
        # Cut before it enters the scale: one false print must not silence the test for good.
        cut = min(abs(gain), 10.0 * scale) if scale > 0 and not opening else abs(gain)
        self._squares += cut * cut
        self._pairs += 1
