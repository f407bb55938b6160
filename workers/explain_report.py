"""An explanation as pictures and one self-contained HTML page: each picture has one message."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.bundle import Bundle
from models.explain import Ablation, Explanation, Weights, entropy, explain
from models.features import DAY_MS, FEATURE_NAMES
from workers.report import BLACK, BLUE, GREY, LIGHT, VERMILLION, WIDE, Picture, Section, write

HEAT_BARS = 390
"""Bars on the heat map: the newest of the symbol with the most."""
FEATURES_SHOWN = 15
LEAST_RISE = 0.1
"""In %: axes of what the loss rises by reach so far at least, or a nothing looks like a finding."""
CLOSE_TO_UNIFORM = 0.95
"""Of the window: an effective length above it is called that."""


def run(
    bundles: Sequence[Bundle],
    bars: pd.DataFrame,
    out: Path,
    advance: Callable[[str], None] = lambda what: None,
) -> Path:
    """Explain the first bundle beside the others; the path of the page. Raises as `explain`."""
    found = explain(bundles, bars, advance=advance)
    path = write(out, "Where the network looks", _summary(found), _sections(found))
    (out / "explanation.json").write_text(json.dumps(found.summary(), indent=1))
    return path


def _summary(e: Explanation) -> dict[str, object]:
    first = e.ablations[0]
    return {
        "bundle": e.bundle.version,
        "bars": len(e.ts),
        "symbols": len(np.unique(e.symbol)),
        "window, bars": e.weights.shape[2],
        "heads": e.weights.shape[1],
        "effective length, bars": float(e.effective_length.mean()),
        f"loss of {first.target}": first.loss,
        "loss with uniform weights": first.uniform,
        "loss with shuffled weights": float(np.mean(first.permuted)),
        "p that shuffled weights do as well": first.p_value,
        "correlation of attention and gradients by lag": None
        if e.gradients is None
        else e.gradients.rank_correlation,
    }


def _sections(e: Explanation) -> list[Section]:
    where = [_by_time_of_day(e), _heat_map(e), _by_head(e), _length(e)]
    matters = [_ablations(e)]
    if len(e.seeds) > 1:
        matters.append(_seeds(e))
    parts = [
        Section("Where it looks", _words(e), where),
        Section(
            "What that is called",
            [
                "Each bar shows how many times its uniform share of the weight a stretch of the window "
                "gets, on the later half of the days; peaks were sought on the earlier half."
            ],
            [_periods(e)],
        ),
        Section(
            "Whether it matters",
            [
                "Attention weights are not an explanation by themselves. If forecasts are as good with "
                "uniform or shuffled weights, the pattern above decides nothing."
            ],
            matters,
        ),
    ]
    if e.gradients is not None:
        parts.append(
            Section(
                "What moves the forecast",
                [
                    "Integrated gradients go from a mean input to the real one and add up what each "
                    "input did to the forecast, by whatever way through the network."
                ],
                [_gradients(e), _features(e)],
            )
        )
    return parts


def _words(e: Explanation) -> list[str]:
    length, T = float(e.effective_length.mean()), e.weights.shape[2]
    named = [p.name for p in e.periods if p.found]
    looks = (
        f"More than chance it looks at: {', '.join(named)}."
        if named
        else "No named stretch of the window gets clearly more than its share."
    )
    return [
        f"Of {T} bars it uses as many as {length:.0f} with equal weights would be. {looks}",
        *(_verdict(a) for a in e.ablations),
    ]


def _verdict(a: Ablation) -> str:
    rise = f"{100 * a.rise.value:+z.1f} % ({100 * a.rise.low:+z.1f} to {100 * a.rise.high:+z.1f} %)"
    matters = "the weights matter" if a.rise.low > 0 else "the weights are not shown to matter"
    return f"{a.target}: with uniform weights the loss changes by {rise}: {matters}."


# ---- pictures ----


def _heat_map(e: Explanation) -> Picture:
    symbols, counts = np.unique(e.symbol, return_counts=True)
    symbol = symbols[counts.argmax()]
    rows = np.flatnonzero(e.symbol == symbol)[-HEAT_BARS:]
    figure, axes = _figure((11.0, 6.0))
    _shade(figure, axes, e.mean[rows].T, origin="lower")
    at = np.linspace(0, len(rows) - 1, 7).astype(int)
    axes.set_xticks(at, [_clock(e, rows[i]) for i in at])
    axes.set_xlabel(f"time of the forecast for {symbol} ({e.bundle.config.features.timezone})")
    axes.set_ylabel("bars back (0 = the newest)")
    spread = float(np.std(e.mean[rows], axis=0).mean() / e.mean[rows].mean())
    return Picture(
        "heat_map",
        "Where it looks changes from bar to bar"
        if spread > 0.25
        else f"Where it looks hardly changes from bar to bar (by {100 * spread:.0f} %)",
        "Each column is one forecast, each row a distance back. Horizontal bands are habits; slanted "
        "lines are single bars that stay in view while they move away.",
        figure,
    )


def _by_time_of_day(e: Explanation) -> Picture:
    hours, mean = e.by_half_hour()
    figure, axes = _figure((11.0, max(2.6, 0.3 * len(hours) + 1.8)))
    _shade(figure, axes, mean, origin="upper")
    axes.set_yticks(range(len(hours)), [_hour(h) for h in hours])
    axes.set_xlabel("bars back (0 = the newest)")
    axes.set_ylabel(f"time of the forecast ({e.bundle.config.features.timezone})")
    lengths = np.exp(entropy(mean))
    low, high = (_hour(hours[i]) for i in (lengths.argmin(), lengths.argmax()))
    return Picture(
        "time_of_day",
        "At every hour the attention is close to uniform"
        if lengths.min() > CLOSE_TO_UNIFORM * mean.shape[1]
        else f"It looks at {lengths.min():.0f} bars at {low}, at {lengths.max():.0f} at {high}",
        "Mean attention by time of day. What shifts by one row a line down is a fixed time, such as "
        "the open; what stays in its column is a fixed distance.",
        figure,
    )


def _by_head(e: Explanation) -> Picture:
    profile = 100 * e.weights.mean(axis=0)
    heads, T = profile.shape
    figure = Figure(figsize=(11.0, 1.2 + 1.35 * heads), layout="constrained")
    panels = figure.subplots(heads, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    lengths = np.exp(entropy(profile / 100))
    for head, (panel, line) in enumerate(zip(panels, profile, strict=True)):
        _plain(panel)
        panel.fill_between(np.arange(T), line, color=BLUE, alpha=0.35, step="mid")
        panel.step(np.arange(T), line, color=BLUE, where="mid", linewidth=1.2)
        panel.axhline(100 / T, color=GREY, linestyle=(0, (2, 2)), linewidth=1)
        panel.set_title(
            f"head {head + 1}: as wide as {lengths[head]:.0f} equal bars, heaviest {line.argmax()} back",
            loc="left",
            fontsize=10,
        )
    panels[-1].set_xlabel("bars back (0 = the newest)")
    figure.supylabel("share of attention, %", fontsize=10)
    wide, narrow = lengths.max(), lengths.min()
    title = (
        f"Heads differ: the widest spreads over {wide:.0f} bars, the narrowest over {narrow:.0f}"
        if wide > 1.3 * narrow
        else "All heads look at much the same"
    )
    return Picture("heads", title, "Dashed: uniform weights.", figure)


def _length(e: Explanation) -> Picture:
    T = e.weights.shape[2]
    figure, axes = _figure(WIDE)
    bucket = e.time_of_day // 1_800_000
    hours = np.unique(bucket)
    for q, style in ((0.25, (0, (2, 2))), (0.5, "-"), (0.75, (0, (2, 2)))):
        line = [np.quantile(e.effective_length[bucket == b], q) for b in hours]
        label = "median" if q == 0.5 else "quartiles" if q == 0.25 else None
        axes.plot(hours / 2, line, color=BLUE, linestyle=style, linewidth=1.6, label=label)
    axes.axhline(T, color=GREY, linewidth=1)
    axes.annotate(
        "uniform", (hours[0] / 2, T), xytext=(2, -12), textcoords="offset points", color=GREY
    )
    axes.set_ylim(0, 1.05 * T)
    axes.set_xticks(hours[::2] / 2, [_hour(h * 1_800_000) for h in hours[::2]])
    axes.set_xlabel(f"time of the forecast ({e.bundle.config.features.timezone})")
    axes.set_ylabel("effective length, bars\n(exp of the entropy)")
    axes.legend(loc="lower right", frameon=False)
    share = float(e.effective_length.mean()) / T
    return Picture(
        "effective_length",
        f"The attention is as wide as {100 * share:.0f} % of its window",
        "How many bars with equal weights would have the same entropy.",
        figure,
    )


def _periods(e: Explanation) -> Picture:
    periods = e.periods[::-1]
    figure, axes = _figure((11.0, 1.6 + 0.42 * len(periods)))
    for i, p in enumerate(periods):
        colour = BLUE if p.found else GREY
        axes.barh(i, p.lift.value, color=colour, height=0.62, alpha=0.85)
        axes.plot([p.lift.low, p.lift.high], [i, i], color=BLACK, linewidth=1.6)
        axes.annotate(
            f"{100 * p.share:.1f} % of the weight, {100 * p.uniform:.1f} % if uniform",
            (max(p.lift.high, p.lift.value), i),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=BLACK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    axes.axvline(1, color=VERMILLION, linestyle="--", linewidth=1.4)
    axes.set_yticks(range(len(periods)), [p.name for p in periods])
    axes.set_xlim(0, 1.45 * max((p.lift.high for p in periods), default=1))
    axes.set_xlabel("weight, as a multiple of its uniform share (dashed: 1)")
    axes.grid(axis="x", color=LIGHT, linewidth=0.6)
    axes.grid(visible=False, axis="y")
    found = [p for p in e.periods if p.found]
    title = (
        f"Looked at most beyond its share: {found[0].name}, {found[0].lift.value:.1f} times"
        if found
        else "No stretch of the window stands out"
    )
    return Picture(
        "periods",
        title,
        "Blue: more than 1.1 times its share with 95 % confidence, days resampled. Black lines: 90 % intervals.",
        figure,
    )


def _ablations(e: Explanation) -> Picture:
    figure = Figure(figsize=(11.0, 1.6 + 1.3 * len(e.ablations)), layout="constrained")
    panels = figure.subplots(len(e.ablations), 1, squeeze=False)[:, 0]
    for panel, a in zip(panels, e.ablations, strict=True):
        _plain(panel)
        rises = 100 * (np.array(a.permuted) / a.loss - 1)
        panel.axvline(0, color=BLUE, linewidth=2)
        panel.plot(rises, np.full(len(rises), 0.0), "|", color=GREY, markersize=16)
        panel.plot([100 * a.rise.low, 100 * a.rise.high], [1, 1], color=VERMILLION, linewidth=1.6)
        panel.plot(100 * a.rise.value, 1, "o", color=VERMILLION)
        panel.set_yticks([0, 1], [f"shuffled, {len(rises)} times", "uniform"])
        panel.set_ylim(-0.6, 1.6)
        low, high = panel.get_xlim()
        panel.set_xlim(min(low, -LEAST_RISE), max(high, LEAST_RISE))
        panel.set_title(f"{a.target}, p = {a.p_value:.2g}", loc="left", fontsize=10)
    panels[-1].set_xlabel("rise of the loss against the learned weights (blue), %")
    first = e.ablations[0]
    rise = 100 * first.rise.value
    title = (
        f"Without its weights the network loses {rise:.1f} %"
        if first.rise.low > 0
        else f"Uniform weights do as well ({rise:+z.1f} %): the pattern explains little"
    )
    return Picture(
        "ablation",
        title,
        "Dot and line: uniform weights, 90 % of days resampled. Ticks: every bar's weights shuffled among "
        "the bars of its window.",
        figure,
    )


def _seeds(e: Explanation) -> Picture:
    figure, axes = _figure(WIDE)
    for i, profile in enumerate(e.seeds):
        axes.step(
            np.arange(len(profile)),
            100 * profile,
            where="mid",
            color=BLUE if i == 0 else GREY,
            linewidth=1.8 if i == 0 else 1.1,
            label="the explained bundle" if i == 0 else "another seed" if i == 1 else None,
        )
    if 20 * min(map(np.min, e.seeds)) < max(map(np.max, e.seeds)):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_ylim(0, 130 * float(max(map(np.max, e.seeds))))
    axes.set_xlabel("bars back (0 = the newest)")
    axes.set_ylabel("share of attention, %")
    axes.legend(loc="upper right", frameon=False)
    bars = float(np.mean([a.bars for a in e.agreement]))
    said = float(np.mean([a.forecasts for a in e.agreement]))
    return Picture(
        "seeds",
        f"Seeds say the same (r = {said:.3g}) and look at the same (r = {bars:.2g})"
        if bars > 0.8
        else f"Seeds say the same (r = {said:.3g}) and look at everything alike"
        if said > 0.8
        and all(float(np.exp(entropy(p))) > CLOSE_TO_UNIFORM * len(p) for p in e.seeds)
        and e.effective_length.mean() > CLOSE_TO_UNIFORM * e.weights.shape[2]
        else f"Seeds say the same (r = {said:.3g}) but look elsewhere (r = {bars:.2g})"
        if said > 0.8
        else f"Seeds disagree on what they say (r = {said:.2g}) and see (r = {bars:.2g})",
        "Correlations are means over all pairs: of forecasts, and of the weights of one bar.",
        figure,
    )


def _gradients(e: Explanation) -> Picture:
    assert e.gradients is not None
    figure, axes = _figure(WIDE)
    lag = np.arange(1, e.weights.shape[2])
    for line, colour, style, name in (
        (e.gradients.by_lag, VERMILLION, "-", "integrated gradients"),
        (e.mean.mean(axis=0), BLUE, (0, (4, 1.2)), "attention"),
    ):
        rest = line[1:].sum()
        share = 100 * line[1:] / rest if rest else line[1:]
        axes.step(lag, share, where="mid", color=colour, linestyle=style, linewidth=1.6, label=name)
    axes.set_xlabel("bars back (the newest, 0, is left out)")
    axes.set_ylabel("share, %")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
    axes.legend(loc="upper right", frameon=False)
    newest = 100 * e.gradients.by_lag[0] / e.gradients.by_lag.sum()
    moved, seen = (
        float(np.exp(entropy(line[1:] / max(line[1:].sum(), 1e-30))))
        for line in (e.gradients.by_lag, e.mean.mean(axis=0))
    )
    return Picture(
        "gradients",
        f"What moves the forecast is as wide as {moved:.0f} bars, what is looked at as {seen:.0f}"
        if e.gradients.by_lag[1:].any()
        else "Nothing but the newest bar moves the forecast, wherever it looks",
        f"Rank correlation of the two lines: {e.gradients.rank_correlation:.2f}. The newest bar has "
        f"{newest:.0f} % of all gradients: skip and recurrent layers read it without attention. What the "
        "state carries from before the window is in neither line.",
        figure,
    )


def _features(e: Explanation) -> Picture:
    assert e.gradients is not None
    share = 100 * e.gradients.by_feature / e.gradients.by_feature.sum()
    top = np.argsort(share)[-FEATURES_SHOWN:]
    figure, axes = _figure((11.0, 4.8))
    axes.barh(range(len(top)), share[top], color=BLUE, height=0.65)
    axes.set_yticks(range(len(top)), [FEATURE_NAMES[i] for i in top])
    axes.set_xlabel("share of all attributions, %")
    axes.grid(axis="x", color=LIGHT, linewidth=0.6)
    axes.grid(visible=False, axis="y")
    return Picture(
        "features",
        f"{FEATURE_NAMES[top[-1]]} moves the forecast most",
        f"The {len(top)} features with the largest integrated gradients, summed over the window.",
        figure,
    )


# ---- what the pictures share ----


def _shade(figure: Figure, axes: Axes, weights: Weights, origin: Literal["lower", "upper"]) -> None:
    """As multiples of the uniform weight. One bar may hold most: the colours end before it does."""
    T = weights.shape[0] if origin == "lower" else weights.shape[1]
    image = T * weights
    shown = axes.imshow(
        image,
        aspect="auto",
        cmap="cividis",
        origin=origin,
        interpolation="nearest",
        vmin=0 if image.max() > 2 else min(0.9, float(image.min())),
        vmax=max(1.1, float(np.quantile(image, 0.995))),
    )
    figure.colorbar(shown, ax=axes, label="attention, 1 = uniform", pad=0.015, extend="max")


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _hour(ms: int) -> str:
    return f"{ms // 3_600_000:02d}:{ms % 3_600_000 // 60_000:02d}"


def _clock(e: Explanation, row: int) -> str:
    day = pd.Timestamp(int(e.ts[row]), unit="ms", tz="UTC").tz_convert(
        e.bundle.config.features.timezone
    )
    return day.strftime(
        "%-d %b %H:%M" if e.bundle.config.features.interval_ms < DAY_MS else "%-d %b %Y"
    )
