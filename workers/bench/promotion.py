"""How often a challenger that is no better is promoted, and how soon one that is better.

Simulated as the monitor sees it: running losses of two forecasters on the same bars, of heavy-tailed
returns and with errors that last, looked at after every bar.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.comparison import Comparison, Rule, Verdict
from models.scoring import loss
from models.targets import Target
from workers.bench.monitor_arl import differences, log_realised, running
from workers.config import MonitorSettings

Floats = NDArray[np.float64]

TARGET = Target(kind="volatility", horizon=30)
DEGREES_OF_FREEDOM = 5.0
ERROR_SD, ERROR_DECAY = 0.5, 0.98
"""Of the champion's log variance forecast, and from bar to bar."""
SHARED = 0.7
"""Of the variance of both forecasters' errors: a challenger is most often the champion's child."""
SYMBOLS = (1, 20)
GAINS = (0.05, 0.1, 0.2, 0.3)
"""Shares by which the better challenger's mean loss is smaller."""


class Ending(NamedTuple):
    verdict: Verdict
    bars: int


def run(runs: int = 1_000, seed: int = 0) -> dict[str, Any]:
    settings = MonitorSettings()
    rule = Rule(alpha=settings.alpha, max_bars=settings.max_shadow_bars)
    rng = np.random.default_rng(seed)
    known = _loss_of_knowing(rng)
    usual = {symbols: usual_scale(rng, symbols) for symbols in SYMBOLS}

    def endings(champion_factor: float, challenger_factor: float, symbols: int) -> list[Ending]:
        sds = (_sd_for(known, champion_factor), _sd_for(known, challenger_factor))
        n = runs if champion_factor <= challenger_factor else max(runs // 5, 10)
        return [compare(rule, rng, *sds, symbols, usual[symbols]) for _ in range(n)]

    power = []
    for symbols in SYMBOLS:
        for gain in GAINS:
            ended = endings(1.0, 1 - gain, symbols)
            won = [ending.bars for ending in ended if ending.verdict == "promote"]
            power.append(
                {
                    "true_gain": gain,
                    "promoted": round(len(won) / len(ended), 3),
                    "median_bars": float(np.median(won)) if won else None,
                    "symbols": symbols,
                }
            )
    return {
        "alpha": rule.alpha,
        "false_promotion_rate": max(share_promoted(endings(1.0, 1.0, s)) for s in SYMBOLS),
        "false_promotion_rate_5_percent_worse": share_promoted(endings(1.0, 1.05, SYMBOLS[-1])),
        "runs": runs,
        "max_bars": rule.max_bars,
        "power": power,
    }


def share_promoted(endings: list[Ending]) -> float:
    return round(sum(ending.verdict == "promote" for ending in endings) / len(endings), 4)


def compare(
    rule: Rule,
    rng: np.random.Generator,
    champion_sd: float,
    challenger_sd: float,
    symbols: int = 1,
    usual: float = 0.0,
) -> Ending:
    """One comparison to its end, by the rule that the monitor goes by; `usual` is the usual scale."""
    n, h = rule.max_bars, TARGET.horizon
    shared, own, other, third = (errors(rng, n + h, symbols) for _ in range(4))
    ours, theirs = (
        sd * (np.sqrt(SHARED) * shared + np.sqrt(1 - SHARED) * rest)
        for sd, rest in ((champion_sd, own), (challenger_sd, other))
    )
    r2, reference = squares(rng, n + h, symbols), ERROR_SD * third
    losses, others = (
        running(h, r2, np.stack([said, reference], axis=2))[h:, :, 0] for said in (ours, theirs)
    )
    gains = losses - others
    comparison = Comparison(rule, usual_scale=usual, pair_bars=h)
    for ts, gain in enumerate(gains.mean(axis=1).tolist()):
        if comparison.update(ts, ts, gain):
            evidence = comparison.get()
            if evidence.verdict != "continue":
                return Ending(evidence.verdict, ts + 1)
    raise AssertionError("the longest duration ends every comparison")


def usual_scale(rng: np.random.Generator, symbols: int) -> float:
    """By which a pair's differences vary while all is well: champion and a reference as good as it."""
    h, n = TARGET.horizon, 20_000
    said = np.stack([ERROR_SD * errors(rng, n + h, symbols) for _ in range(2)], axis=2)
    means = differences(h, squares(rng, n + h, symbols), said)[h:].mean(axis=1)
    return float(np.std(means[: n // h * h].reshape(-1, h).mean(axis=1)))


def squares(rng: np.random.Generator, n: int, symbols: int) -> Floats:
    """Squared returns of variance 1, f64[n, symbols]."""
    nu = DEGREES_OF_FREEDOM
    return np.asarray(rng.standard_t(nu, (n, symbols)) ** 2 * (nu - 2) / nu)


def realised(rng: np.random.Generator, n: int, symbols: int) -> Floats:
    """Log of the mean of `horizon` squared returns of variance 1, f64[n, symbols]: labels overlap."""
    return log_realised(squares(rng, n + TARGET.horizon, symbols), TARGET.horizon)[:n]


def errors(rng: np.random.Generator, n: int, symbols: int) -> Floats:
    """Stationary errors of unit variance that fade by `ERROR_DECAY` a bar, f64[n, symbols]."""
    shocks = rng.normal(0.0, np.sqrt(1 - ERROR_DECAY**2), (n, symbols))
    shocks[0] = rng.normal(size=symbols)
    for t in range(1, n):
        shocks[t] += ERROR_DECAY * shocks[t - 1]
    return shocks


def _loss_of_knowing(rng: np.random.Generator) -> float:
    y = realised(rng, 400_000, 1)
    return float(np.mean(loss(TARGET, np.zeros_like(y), y)))


def _sd_for(known: float, factor: float) -> float:
    """The error at which the mean loss is `factor` times that of `ERROR_SD`.

    An error of standard deviation s adds exp(s^2 / 2) - 1 to the loss of knowing the variance.
    """
    wanted = factor * (known + np.expm1(ERROR_SD**2 / 2)) - known
    return float(np.sqrt(2 * np.log1p(wanted)))
