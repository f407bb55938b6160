"""An evaluation as one self-contained HTML page: what came out in words, a table, four pictures."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workers.report import BLACK, BLUE, GREEN, GREY, LIGHT, ORANGE, VERMILLION, Picture

SHOWN = {
    "volatility": "qlike",
    "return": "mse",
    "direction": "brier",
}
MEASURE = {
    "qlike": "QLIKE (lower is better)",
    "mse": "mean squared error (lower is better)",
    "brier": "Brier score (lower is better)",
}
NAMES = {
    "last_value": "last value",
    "ewma": "EWMA",
    "garch": "GARCH(1,1)",
    "har": "log-HAR",
    "har_tod": "HAR + time of day",
    "har_extended": "HAR, all inputs + time of day",
    "linear": "linear, all inputs",
    "xgboost": "XGBoost, all inputs",
    "lstm": "LSTM, no attention",
    "lstm_mean": "LSTM, no attention, mean of seeds",
    "lstm_attention": "LSTM + attention",
    "lstm_attention_mean": "LSTM + attention, mean of seeds",
    "blend": "blend of network, trees, line",
    "blend_stacked": "the blend, weights by validation",
    "opposite_of_last_bar": "opposite of last bar",
    "majority": "majority",
    "zero": "zero",
}
COLUMNS = {
    "volatility": (
        ("qlike", "QLIKE", "{:.4f}"),
        ("qlike_sd", "sd of seeds", "{:.4f}"),
        ("mse_log", "MSE of log", "{:.4f}"),
        ("r2_vs_har", "R² against log-HAR", "{:+.1%}"),
        ("symbol_median_change_vs_har_tod", "median symbol against HAR + time of day", "{:+.1%}"),
        ("slope", "slope", "{:.2f}"),
    ),
    "return": (
        ("mse", "MSE", "{:.4g}"),
        ("r2_vs_zero", "R² against zero", "{:+.3%}"),
        ("ic", "rank IC", "{:+.4f}"),
        ("ic_sd", "sd of seeds", "{:.4f}"),
    ),
    "direction": (
        ("accuracy", "accuracy", "{:.2%}"),
        ("accuracy_sd", "sd of seeds", "{:.2%}"),
        ("brier", "Brier", "{:.5f}"),
        ("log_loss", "log loss", "{:.5f}"),
        ("ic", "rank IC", "{:+.4f}"),
        ("calibration_error", "calibration error", "{:.4f}"),
    ),
}
LINES = {  # the curves that are drawn: colour, dashes
    "xgboost": (ORANGE, "--"),
    "lstm_mean": (GREEN, "-."),
    "lstm_attention_mean": (BLUE, "-"),
    "blend": (BLACK, (0, (5, 1, 1, 1))),
    "har_extended": (VERMILLION, ":"),
}

Result = Mapping[str, Any]


def write(path: Path, result: Result) -> None:
    """Write the page for what `models.evaluation.evaluate` gave."""
    protocol = result["protocol"]
    blocks = [f"<p>{html.escape(text)}</p>" for text in in_words(result)]
    blocks.append(_table(result))
    for picture in pictures(result):
        png = base64.b64encode(picture.png()).decode()
        blocks.append(
            f'<figure><img alt="{html.escape(picture.title)}" src="data:image/png;base64,{png}">'
            f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
        )
    if result.get("ablations"):
        blocks += ["<h2>Where the skill comes from</h2>", _ablations(result["ablations"])]
    rows = "".join(
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in protocol.items()
    )
    title = f"Evaluation of {protocol['target']}, {protocol['symbols']} symbols"
    page = _PAGE.format(title=html.escape(title), body="\n".join(blocks), rows=rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def in_words(result: Result) -> list[str]:
    """What a reader should know before any picture, negative results included."""
    protocol, kind = result["protocol"], _kind(result)
    rows = {row["model"]: row for row in result["rows"]}
    measure = SHOWN[kind]
    best = min(rows.values(), key=lambda row: row[measure])
    texts = [
        f"{protocol['bars']:,} bars of {protocol['symbols']} symbols, {protocol['bar_seconds'] / 60:g} "
        f"minutes each, {protocol['from']} to {protocol['to']}. Forecast: {protocol['target']}, "
        f"{protocol['horizon_bars']} bars ahead. The newest {protocol['out_of_sample']:.0%} of the times "
        f"({best['n']:,} forecasts) are out of sample; every model was fitted {protocol['refits']} "
        f"time(s), before each stretch of {protocol['refit_every_days']:.0f} days.",
        f"Best by {MEASURE[measure].split(' (')[0]}: {NAMES.get(best['model'], best['model'])}, "
        f"{best[measure]:.4g}.",
    ]
    for model in ("lstm_attention", "lstm_attention_mean", "blend", "blend_stacked"):
        changes = [
            f"{_change(rows[model]['loss_change_vs'][rival])} against {NAMES[rival]} "
            f"({_verdict(test)})"
            for rival, test in rows[model]["dm_vs"].items()
        ]
        texts.append(f"{NAMES[model]}: loss {'; '.join(changes)}.")
    return texts


def measure_of(result: Result) -> str:
    """Name of the loss in the rows of `result`."""
    return SHOWN[_kind(result)]


def pictures(result: Result) -> list[Picture]:
    return [_bars(result), _curves(result), _symbols(result), _reliability(result)]


def _bars(result: Result) -> Picture:
    measure = SHOWN[_kind(result)]
    rows = sorted(result["rows"], key=lambda row: -row[measure])
    figure = Figure(figsize=(11, 0.42 * len(rows) + 1.4), layout="constrained")
    axes = _plain(figure.add_subplot(), "x")
    places = np.arange(len(rows))
    values = np.array([row[measure] for row in rows])
    ours = ["lstm" in row["model"] or "blend" in row["model"] for row in rows]
    colours = [BLUE if own else LIGHT for own in ours]
    spread = [row.get(f"{measure}_sd", 0.0) for row in rows]
    low, high = values.min(), float(np.quantile(values, 0.75))
    limit = high + 0.6 * (high - low) + 1e-12
    start = max(0.0, low - 0.6 * (high - low)) if measure != "qlike" else 0.0
    end = limit + 0.1 * (limit - start)
    axes.barh(
        places, values - start, left=start, color=colours, xerr=spread, ecolor=BLACK, height=0.7
    )
    for place, value, sd in zip(places, values, spread, strict=True):
        inside = value + sd > limit
        axes.annotate(
            f"{value:.4g} →" if value + sd > end else f"{value:.4g}",
            (min(value + sd, end), place),
            xytext=(-6 if inside else 6, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(places, [NAMES.get(row["model"], row["model"]) for row in rows])
    axes.set_xlim(start, end)
    axes.set_xlabel(MEASURE[measure])
    best = rows[-1]
    return Picture(
        "models",
        f"Lowest loss: {NAMES.get(best['model'], best['model'])}",
        "Blue: the network and what contains it; grey: rivals. Whiskers: one standard deviation over "
        "seeds. An arrow: the bar goes on beyond the picture.",
        figure,
    )


def _curves(result: Result) -> Picture:
    curves = result["curves"]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = _plain(figure.add_subplot(), "y")
    when = np.array(curves["ts"], "datetime64[ms]")
    for name, (colour, dashes) in LINES.items():
        if name in curves["sums"]:
            sums = np.array(curves["sums"][name])
            axes.plot(when, sums, color=colour, linestyle=dashes, linewidth=1.8, label=NAMES[name])
    axes.axhline(0, color=GREY, linewidth=1)
    rival = NAMES[curves["against"]]
    axes.set_ylabel(f"loss less that of {rival},\nsummed over bar times")
    axes.legend(loc="best", frameon=False)
    return Picture(
        "over_time",
        f"Is the gain over {rival} steady, or from a few days?",
        "A line that falls all the time gains all the time; a step is an event. Every bar time counts "
        "once, with the mean over its symbols.",
        figure,
    )


def _symbols(result: Result) -> Picture:
    against = result["protocol"]["benchmark"]
    model = "blend"
    found = sorted(
        (row["loss"][model] / row["loss"][against] - 1, row["symbol"])
        for row in result["symbols"]
        if row["loss"][against] > 0
    )
    changes = 100 * np.array([change for change, _ in found])
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = _plain(figure.add_subplot(), "y")
    colours = [BLUE if change < 0 else VERMILLION for change in changes]
    axes.bar(np.arange(len(found)), changes, color=colours)
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.axhline(float(np.median(changes)), color=GREY, linestyle="--", linewidth=1)
    every = max(1, -(-len(found) // 40))
    axes.set_xticks(
        range(0, len(found), every), [name for _, name in found][::every], rotation=90, fontsize=8
    )
    axes.set_ylabel("change of loss, %")
    better = int((changes < 0).sum())
    return Picture(
        "symbols",
        f"{NAMES[model]} beats {NAMES[against]} on {better} of {len(found)} symbols",
        f"Each symbol's own out-of-sample loss; dashed: the median, {np.median(changes):+.1f} %.",
        figure,
    )


def _reliability(result: Result) -> Picture:
    kind, tables = _kind(result), result["calibration"]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = _plain(figure.add_subplot(), "y")
    shown = [name for name in ("har_tod", *LINES) if name in tables]
    for name in shown:
        colour, dashes = LINES.get(name, (GREY, "-"))
        forecast = np.array([b["forecast"] for b in tables[name]])
        realised = np.array([b["realised"] for b in tables[name]])
        ratio = realised / forecast if kind == "volatility" else realised
        across = np.arange(1, len(ratio) + 1) if kind == "volatility" else forecast
        axes.plot(
            across,
            ratio,
            color=colour,
            linestyle=dashes,
            marker="o",
            markersize=3,
            label=NAMES[name],
        )
    if kind == "volatility":
        axes.axhline(1, color=BLACK, linewidth=0.8)
        axes.set_xlabel("tenth of the forecasts, calmest first")
        axes.set_ylabel("realised / forecast variance")
        title, caption = "Is the forecast variance what comes?", "1 is right on average."
    else:
        edges = axes.get_xlim()
        axes.plot(edges, edges, color=BLACK, linewidth=0.8)
        axes.set_xlabel("forecast")
        axes.set_ylabel("outcome, mean")
        title, caption = "Does the forecast mean what it says?", "The diagonal is right on average."
    axes.legend(loc="best", frameon=False)
    return Picture("calibration", title, f"Ten groups of equal size. {caption}", figure)


def _table(result: Result) -> str:
    columns = [c for c in COLUMNS[_kind(result)] if any(c[0] in row for row in result["rows"])]
    rivals = list(result["rows"][-1]["dm_vs"])
    head = "".join(f"<th>{html.escape(title)}</th>" for _, title, _ in columns)
    head += "".join(f"<th>against {html.escape(NAMES[rival])}</th>" for rival in rivals)
    lines = []
    for row in result["rows"]:
        cells = [form.format(row[name]) if name in row else "" for name, _, form in columns]
        for rival in rivals:
            test = row["dm_vs"].get(rival)
            change = row["loss_change_vs"].get(rival, 0.0)
            cells.append(f"{_change(change)} ({_verdict(test)})" if test else "")
        cells += [f"{row['seconds_fit']:.1f}", f"{row['seconds_predict']:.2f}"]
        name = NAMES.get(row["model"], row["model"])
        lines.append(
            f"<tr><th>{html.escape(name)}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"
        )
    return (
        f"<table class='wide'><tr><th>model</th>{head}<th>fit, s</th><th>forecast, s</th></tr>"
        f"{''.join(lines)}</table><p>Change of loss against a rival, with the p-value of "
        "Diebold and Mariano. Seconds of networks are for one seed.</p>"
    )


def _ablations(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = "".join(
        f"<tr><th>{html.escape(row['variant'])}</th><td>{row['loss']:.4f}</td>"
        f"<td>{_change(row['change'])}</td><td>p = {row['p_value']:.3f}</td>"
        f"<td>{row['seconds']:.0f}</td></tr>"
        for row in rows
    )
    return (
        "<table><tr><th>variant</th><th>loss</th><th>against the default</th>"
        f"<th>Diebold-Mariano</th><th>seconds</th></tr>{lines}</table>"
    )


def _change(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _verdict(test: Mapping[str, Any]) -> str:
    p = test["p_value"]
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _kind(result: Result) -> str:
    return str(result["protocol"]["target"].split("_")[0])


def _plain(axes: Axes, grid: str) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if grid == "x" else "y", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ width: 100%; height: auto; }} figure {{ margin: 1.5rem 0; }}
figcaption {{ color: #555; font-size: .92rem; }}
table {{ border-collapse: collapse; font-size: .85rem; }} .wide {{ display: block; overflow-x: auto; }}
th, td {{ text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }}
th {{ font-weight: 500; color: #555; }} td {{ font-variant-numeric: tabular-nums; }}
</style></head><body>
<h1>{title}</h1>
{body}
<h2>How it was done</h2>
<table>{rows}</table>
</body></html>
"""
