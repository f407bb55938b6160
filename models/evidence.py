"""What stands in a bundle beside its weights: references, alarm, scores, golden inputs, origin.

Shapes: n bars of a symbol, F features, K targets, L steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models import baselines
from models.bundle import Bundle, LabelScaling, Provenance
from models.dataset import BarsRejected, History
from models.drift import DETECTORS, Calibration, calibrate
from models.features import WARM_UP_BARS, FeatureSpec
from models.forecasters import expected_variance
from models.running_loss import pair_bars, running_losses, runs_up
from models.scoring import Floats, loss
from models.splits import Span
from models.targets import Target

GOLDEN_STREAMS, GOLDEN_STEPS = 4, 40
MIN_CALIBRATION_BARS = 250
"""Bar times of validation below which a bundle has no alarm rather than a wrong one."""
MAX_CALIBRATION_SYMBOLS = 200


class Scored(NamedTuple):
    """Losses of one symbol's rows f64[n, K]; NaN where nothing was forecast."""

    losses: Floats
    reference_losses: Floats


def score(bundle: Bundle, past: Sequence[History], values: Sequence[Floats]) -> list[Scored]:
    """Losses of the forecasts, and of the frozen references on the same rows."""
    config = bundle.config
    scored = []
    for h, v in zip(past, values, strict=True):
        log_variances = baselines.history(config.features, h.ts, h.ohlcv[:, 3])
        losses, reference_losses = np.empty(v.shape), np.empty(v.shape)
        for k, (target, reference) in enumerate(
            zip(config.targets, config.references, strict=True)
        ):
            losses[:, k] = loss(target, v[:, k], h.y[:, k])
            said = reference.forecast(target, log_variances)
            reference_losses[:, k] = np.where(
                np.isnan(v[:, k]), np.nan, loss(target, said, h.y[:, k])
            )
        scored.append(Scored(losses, reference_losses))
    return scored


def watched(
    bundle: Bundle, past: Sequence[History], values: Sequence[Floats], scored: Sequence[Scored]
) -> list[Floats]:
    """What the monitor watches of each symbol f64[n, K], in the row of the bar at which it is pooled.

    The difference of running losses where the target has them, else of the matured ones in `scored`.
    """
    config, found = bundle.config, []
    for h, v, s in zip(past, values, scored, strict=True):
        differences = s.losses - s.reference_losses
        log_variances = baselines.history(config.features, h.ts, h.ohlcv[:, 3])
        for k, (target, reference) in enumerate(
            zip(config.targets, config.references, strict=True)
        ):
            if runs_up(target):
                said = np.stack([v[:, k], reference.forecast(target, log_variances)], axis=1)
                running = running_losses(target, config.features, h.ts, h.ohlcv, said)
                differences[:, k] = running[:, 0] - running[:, 1]
        found.append(differences)
    return found


def fit_references(
    past: Sequence[History], spec: FeatureSpec, targets: Sequence[Target], span: Span
) -> tuple[baselines.Reference, ...]:
    """The simple reference of each target, from the training rows alone."""
    series = [
        (
            baselines.history(spec, h.ts, h.ohlcv[:, 3]),
            np.where(span.purged_rows(h.ts, h.known_ts)[:, None], h.y, np.nan),
        )
        for h in past
    ]
    return tuple(
        baselines.fit_reference(target, [(log_variances, y[:, k]) for log_variances, y in series])
        for k, target in enumerate(targets)
    )


def variance_bias(
    targets: Sequence[Target], past: Sequence[History], values: Sequence[Floats]
) -> tuple[float, ...]:
    """What to add to each log variance so that its exp() is a mean; 0 for other targets."""
    said, labels = np.concatenate(values), np.concatenate([h.y for h in past])
    known = np.isfinite(said) & np.isfinite(labels)
    return tuple(
        expected_variance(said[known[:, k], k], labels[known[:, k], k])
        if target.kind == "volatility"
        else 0.0
        for k, target in enumerate(targets)
    )


def calibrations_of(
    past: Sequence[History],
    targets: Sequence[Target],
    differences_of: Sequence[Floats],
    arl0_bars: int,
    seed: int,
) -> tuple[Calibration | None, ...]:
    """The alarm of each target, from what `watched` gave; None where there is too little for one."""
    times = np.unique(bar_times(past))
    found = []
    for k, target in enumerate(targets):
        differences = [own[:, k] for own in differences_of]
        busiest = sorted(range(len(past)), key=lambda i: -np.isfinite(differences[i]).sum())
        wide = np.full((len(times), min(len(past), MAX_CALIBRATION_SYMBOLS)), np.nan)
        for column, i in enumerate(busiest[: wide.shape[1]]):
            wide[np.searchsorted(times, past[i].ts), column] = differences[i]
        wide = wide[np.isfinite(wide).any(axis=1)]
        pairs = pair_bars(target) if runs_up(target) else None
        found.append(
            calibrate(wide, target.horizon, arl0_bars, seed, detectors=DETECTORS, pair_bars=pairs)
            if len(wide) >= MIN_CALIBRATION_BARS
            else None
        )
    return tuple(found)


def metrics_of(targets: Sequence[Target], scored: Sequence[Scored]) -> dict[str, float]:
    """Means over all scored rows."""
    found = {}
    for k, target in enumerate(targets):
        for name, column in (
            ("loss", [s.losses[:, k] for s in scored]),
            ("reference_loss", [s.reference_losses[:, k] for s in scored]),
        ):
            found[f"{target.name}/{name}"] = float(np.nanmean(np.concatenate(column)))
    return found


def label_scaling(y: Floats, target: Target) -> LabelScaling:
    """Of the labels y[n] of the training part; a direction is left as it is."""
    if target.kind == "direction":
        return LabelScaling()
    sd = float(y.std())
    return LabelScaling(mean=float(y.mean()), sd=sd if sd > 0 else 1.0)


def golden_inputs(past: Sequence[History], span: Span) -> NDArray[np.float32]:
    """Real rows f32[n, L, F] from the end of the span, of the symbols that have enough."""
    found = []
    for h in past:
        rows = np.flatnonzero(h.is_warm & span.rows(h.ts))[-GOLDEN_STEPS:]
        if len(rows) == GOLDEN_STEPS:
            found.append(h.x[rows])
    return np.stack(found[:GOLDEN_STREAMS])


def provenance_of(past: Sequence[History], seed: int, parent: str | None) -> Provenance:
    times = bar_times(past)
    return Provenance(
        parent=parent,
        seed=seed,
        from_ts=int(times.min()),
        to_ts=int(times.max()),
        bars=len(times),
        symbols=len(past),
    )


def bar_times(past: Sequence[History]) -> NDArray[np.int64]:
    return np.concatenate([h.ts for h in past])


def too_short(past: Sequence[History]) -> BarsRejected:
    longest = max(len(h.ts) for h in past)
    return BarsRejected(
        f"too few bars: the longest of {len(past)} symbol(s) has {longest}; features need "
        f"{WARM_UP_BARS} before the first example, then come burn-in and horizon; and prices must move"
    )
