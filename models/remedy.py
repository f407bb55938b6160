"""What to do about a champion that has become worse: how much of its excess loss is level, and which remedy.

A forecast can be wrong in level (always too high) or in shape (high at the wrong times). A level is
put right by one constant, in a moment and from few bars; a shape has to be learnt. Where the champion
is an ensemble, its members are seldom all wrong in the same way: other weights cost a moment too.

The rule. An alarm says since when the champion is worse; only bars since then are of the new kind.
It is answered once there are `trainer.least_new_bars` of them, and answered anew whenever it is
raised again, which it is at twice as many bars as the last time (`monitor.repeat_bars`) until the
champion is well. Each answer is the cheapest remedy that can help, has enough new bars and was not
tried on this champion; if all were, the dearest of them again, for it now has twice the bars.

A constant can help where it takes away `LEVEL_SHARE` of the excess; other weights of an ensemble can
where they take away `WEIGHTS_SHARE` of it, and have `MIN_PERIODS` of the target since it began to go
by. They have a slot of their own, so while that is taken another remedy is. To learn always can.
"""

from collections.abc import Collection, Mapping
from typing import Final, NamedTuple, Unpack

import numpy as np
import pandas as pd

from models.blending import MIN_PERIODS, EnsembleConfig
from models.bundle import Bundle
from models.dataset import histories, load_bars
from models.features import WARM_UP_BARS
from models.pipeline import (
    FINE_TUNING,
    FitOptions,
    Recipe,
    fine_tune,
    fit_anew,
    forecast,
    score,
    shift_level,
)
from models.scoring import Floats, loss
from models.splits import Span
from models.targets import Target
from schemas.messages import Policy

LADDER: tuple[Policy, ...] = ("bias", "weights", "fine_tune", "full")
"""From the cheapest remedy to the dearest."""
NEEDED_BARS: Final[Mapping[Policy, int]] = {"bias": 0, "weights": 0, "fine_tune": 0, "full": 1_950}
"""New bar times below which a remedy is out of the question: who forgets all must learn all anew."""
LEVEL_SHARE = 0.8
"""Of the excess loss: from here on a constant is remedy enough, the goal of any retrain being 80 %."""
WEIGHTS_SHARE = 0.5
"""Of the excess loss. Lower than for a constant: to try them keeps no other remedy from its slot."""
LEAST_BARS = 60
"""Bar times with matured forecasts below which older ones are looked at too."""
OLDER_SHARE = 3
"""Older bars that a fine-tune sees for each new one: it was best between 1 and 3
(tests/benchmarks/quality-loop.md), and three are the safer where the alarm was false."""
MORE_EPOCHS = 4
"""Times as many over such a lesson, which is short, as over all bars."""


class Excess(NamedTuple):
    """Excess loss of one target over recent matured bars, and what cheap remedies would win back."""

    total: float
    """Mean of loss minus reference loss, above what it was while all was well."""
    level: float
    """The part of it that adding `shift` to every forecast takes away."""
    shift: float
    rows: int
    weights: float = 0.0
    """The part of it that other weights of an ensemble's members take away; 0 of anything else."""

    @property
    def level_share(self) -> float:
        """0 where there is no excess."""
        return self.level / self.total if self.total > 0 else 0.0

    @property
    def weights_share(self) -> float:
        """0 where there is no excess."""
        return self.weights / self.total if self.total > 0 else 0.0


def recent_excess(bundle: Bundle, bars: pd.DataFrame, target: Target, since_ts: int) -> Excess:
    """Of the forecasts made since `since_ts`, or of the last `LEAST_BARS` if these are fewer.

    `bars` hold enough history before for the bundle to be warm. Raises ValueError if it never is.
    """
    config = bundle.config
    k = config.targets.index(target)
    past = histories(load_bars(bars), config.features, config.targets)
    times = np.unique(bars["ts"])
    oldest = min(since_ts, int(times[-min(len(times), LEAST_BARS + target.horizon)]))
    values = forecast(bundle, past, Span(oldest, int(times[-1]) + 1))
    scored = score(bundle, past, values)
    ts = np.concatenate([h.ts for h in past])
    labels = np.concatenate([h.y[:, k] for h in past])
    said = np.concatenate([v[:, k] for v in values])
    reference = np.concatenate([s.reference_losses[:, k] for s in scored])
    known = np.isfinite(said) & np.isfinite(labels) & np.isfinite(reference)
    if not known.any():
        raise ValueError("no recent forecast has matured: too few bars")
    since_ts = min(since_ts, int(np.unique(ts[known])[-LEAST_BARS:][0]))
    rows = known & (ts >= since_ts)
    calibration = config.calibrations[k]
    usual = calibration.mean if calibration is not None else 0.0
    found = excess(target, said[rows], labels[rows], reference[rows], usual)
    if isinstance(config.network, EnsembleConfig):
        from models.ensemble import gain

        recent = Span(since_ts, int(times[-1]) + 1)
        found = found._replace(weights=gain(bundle, past, recent, target))
    return found


def excess(
    target: Target, said: Floats, labels: Floats, reference_losses: Floats, usual: float
) -> Excess:
    """Of n forecasts f64[n]; `usual` is the mean of loss minus reference loss while all was well."""
    losses = loss(target, said, labels)
    shift = best_shift(target, said, labels)
    return Excess(
        total=float(np.mean(losses - reference_losses)) - usual,
        level=float(np.mean(losses - loss(target, said + shift, labels))),
        shift=shift,
        rows=len(said),
    )


def best_shift(target: Target, said: Floats, labels: Floats) -> float:
    """The constant that minimises the mean loss when added to every forecast; 0 for a direction.

    Of QLIKE: log mean exp(label - forecast), where its derivative is zero.
    """
    error = labels - said
    match target.kind:
        case "volatility":
            return float(np.logaddexp.reduce(error) - np.log(len(error)))
        case "return":
            return float(np.mean(error))
        case _:
            return 0.0


def choose(found: Excess, tried: Collection[Policy], new_bars: int | None = None) -> Policy:
    """By the rule above; `new_bars` None where nobody said since when, and all bars are alike."""
    helpless = set[Policy]()
    if found.level_share < LEVEL_SHARE:
        helpless.add("bias")
    if found.weights_share < WEIGHTS_SHARE:
        helpless.add("weights")
    able = [
        policy
        for policy in LADDER
        if policy not in helpless and (new_bars is None or new_bars >= NEEDED_BARS[policy])
    ]
    return next((policy for policy in able if policy not in tried), able[-1])


def lesson(
    policy: Policy, parent: Bundle, bars: pd.DataFrame, since_ts: int, epochs: int
) -> tuple[pd.DataFrame, Recipe]:
    """What a remedy learns from, and how: all `bars` in so many epochs, but for two of them.

    A fine-tune learns from the bars since `since_ts`, `OLDER_SHARE` times as many before, and what
    warms the network up to them, the more often. Weights go by the bars since `since_ts` alone.
    Both take all bars where the new ones are too few or as many.
    """
    if policy not in ("fine_tune", "weights"):
        return bars, _with_epochs(Recipe(), epochs)
    each = int(bars.groupby("symbol").size().max())
    new = bars.loc[bars["ts"] >= since_ts, "ts"].nunique()
    warming = WARM_UP_BARS + parent.config.warm_up_bars
    if policy == "weights":
        least = (MIN_PERIODS + 1) * max(target.horizon for target in parent.config.targets)
        every = new < least or warming + new >= each
        recent = bars if every else bars.groupby("symbol").tail(warming + new)
        return recent, Recipe()
    wanted = warming + (1 + OLDER_SHARE) * new
    if new < LEAST_BARS or wanted >= each:
        return bars, _with_epochs(FINE_TUNING, epochs)
    recipe = FINE_TUNING.model_copy(update={"validation": new / wanted})
    recent = bars.groupby("symbol").tail(wanted)
    return recent, _with_epochs(recipe, MORE_EPOCHS * epochs)


def apply(
    policy: Policy,
    parent: Bundle,
    bars: pd.DataFrame,
    recipe: Recipe,
    target: Target,
    shift: float,
    **options: Unpack[FitOptions],
) -> Bundle:
    """A child of `parent` by that remedy, from its `lesson`; `shift` is that of `recent_excess`.

    Raises as `fit_bundle`.
    """
    match policy:
        case "bias":
            return shift_level(parent, bars, target, shift)
        case "weights":
            from models.ensemble import reweigh

            return reweigh(parent, bars, options.get("device", "auto"))
        case "fine_tune":
            return fine_tune(parent, bars, recipe=recipe, **options)
        case "full":
            return fit_anew(parent, bars, recipe=recipe, **options)


def _with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    training = recipe.training.model_copy(update={"epochs": epochs})
    return recipe.model_copy(update={"training": training})
