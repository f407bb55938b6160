"""Pictures of a run, and one self-contained HTML page around them.

Times on the horizontal axis are trading time: nights and holidays take no room. Colours are those
of Okabe & Ito, which the colour-blind tell apart; lines differ in dashes too.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

NEW_YORK = "America/New_York"
NIGHT_MS = 2 * 3_600_000
SESSIONS_PER_YEAR = 252

BLACK, GREY, LIGHT = "#222222", "#7a7a7a", "#d9d9d9"
BLUE, ORANGE, VERMILLION, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"

WIDE = (11.0, 4.6)

Dashes = str | tuple[float, tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """Something that happened at a bar time: a vertical line, with words if there are any."""

    ts: int
    text: str
    colour: str = GREY


@dataclass(frozen=True)
class Picture:
    """`title` is the message of the picture, in words; `caption` says how to read it."""

    name: str
    title: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        self.figure.suptitle(self.title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=130, facecolor="white")
        return buffer.getvalue()


@dataclass(frozen=True)
class Section:
    title: str
    paragraphs: Sequence[str]
    pictures: Sequence[Picture] = ()
    rows: Sequence[tuple[str, str]] = ()
    """A table of names and values, after the pictures."""


class TradingTime:
    """Maps bar times to sessions since the first: 2.5 is the middle of the third session."""

    def __init__(self, ts: NDArray[np.int64]) -> None:
        ts = np.unique(ts)
        first = np.r_[0, np.flatnonzero(np.diff(ts) > NIGHT_MS) + 1]
        last = np.r_[first[1:] - 1, len(ts) - 1]
        self.opens, self.closes = ts[first], ts[last]

    def __len__(self) -> int:
        return len(self.opens)

    def __call__(self, ts: NDArray[np.int64] | int) -> NDArray[np.float64]:
        at = np.asarray(ts)
        session = np.clip(np.searchsorted(self.opens, at, side="right") - 1, 0, None)
        span = np.maximum(self.closes - self.opens, 1)[session] + 60_000
        return np.asarray(session + np.clip((at - self.opens[session]) / span, 0, 1))

    def label(self, axes: Axes) -> None:
        """Dates under the axis, at most a dozen, at session opens."""
        step = max(1, -(-len(self) // 12))
        places = range(0, len(self), step)
        axes.set_xticks(list(places), [_date(int(self.opens[i])) for i in places])
        axes.set_xlim(0, len(self))


def volatility(forecasts: pd.DataFrame, marks: Sequence[Mark], symbol: str) -> Figure:
    """Realised and predicted volatility: columns ts, value, label (log variance per minute)."""
    time = TradingTime(forecasts["ts"].to_numpy())
    figure, axes = new_figure(WIDE)
    session = np.floor(time(forecasts["ts"].to_numpy()))
    top = 0.0
    half_hour = session + np.floor((time(forecasts["ts"].to_numpy()) - session) * 13) / 13
    for column, colour, dashes, name in (
        ("label", BLACK, "-", "realised"),
        ("value", ORANGE, (0, (4, 1.2)), "predicted half an hour before"),
    ):
        variance = np.exp(forecasts[column])
        fine = _annual_percent(variance.groupby(half_hour).mean())
        coarse = _annual_percent(variance.groupby(session).mean())
        axes.plot(fine.index, fine, color=colour, alpha=0.28, linewidth=0.7)
        axes.plot(coarse.index + 0.5, coarse, color=colour, linestyle=dashes, linewidth=2.2)
        axes.plot([], [], color=colour, linestyle=dashes, linewidth=2.2, label=name)
        top = max(top, float(coarse.max()))
    axes.set_ylabel(f"volatility of {symbol}, % a year")
    axes.set_ylim(0, 1.4 * top)
    axes.legend(loc="upper left", frameon=False)
    time.label(axes)
    _mark(axes, time, marks)
    return figure


def statistic(series: pd.DataFrame, threshold: float, marks: Sequence[Mark]) -> Figure:
    """The monitor's statistic against its threshold: columns ts, statistic, bundle."""
    time = TradingTime(series["ts"].to_numpy())
    figure, axes = new_figure(WIDE)
    for i, part in enumerate(p for _, p in series.groupby("bundle", sort=False)):
        axes.plot(
            time(part["ts"].to_numpy()),
            part["statistic"],
            color=(BLUE, GREEN, VERMILLION)[i % 3],
            linewidth=1.2,
            label="first champion" if i == 0 else f"champion {i + 1}",
        )
    axes.axhline(threshold, color=VERMILLION, linestyle="--", linewidth=1.4)
    axes.annotate(
        "alarm above this line",
        (1, threshold),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        color=VERMILLION,
    )
    axes.set_ylabel("excess loss, accumulated (sd)")
    axes.set_ylim(0, 1.25 * threshold)
    axes.legend(loc="upper left", frameon=False)
    time.label(axes)
    _mark(axes, time, marks)
    return figure


def losses(outcomes: pd.DataFrame, marks: Sequence[Mark], window_bars: int = 390) -> Figure:
    """Rolling mean loss of each role: columns ts, role, bundle, loss, reference_loss."""
    time = TradingTime(outcomes["ts"].to_numpy())
    figure, axes = new_figure(WIDE)
    champion = outcomes[outcomes["role"] == "champion"]
    challengers = outcomes[outcomes["role"] == "challenger"].groupby("bundle", sort=False)
    lines: list[tuple[pd.DataFrame, str, str, Dashes, str | None]] = [
        (champion, "reference_loss", GREY, (0, (1, 1)), "frozen reference (EWMA)"),
        (champion, "loss", BLUE, "-", "champion"),
    ]
    name: str | None = "challenger, in shadow"
    for _, part in challengers:
        lines.append((part, "loss", VERMILLION, (0, (4, 1.2)), name))
        name = None
    for part, column, colour, dashes, label in lines:
        mean = part[column].rolling(window_bars, min_periods=window_bars // 4).mean()
        x = time(part["ts"].to_numpy())
        axes.plot(x, mean, color=colour, linestyle=dashes, linewidth=1.8, label=label)
    axes.set_ylabel(f"QLIKE loss, mean of {window_bars} bars\n(smaller is better)")
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper left", frameon=False)
    time.label(axes)
    _mark(axes, time, marks)
    return figure


def attention(ts: NDArray[np.int64], weights: NDArray[np.float32]) -> Figure:
    """Mean attention by time of day and lag: i64[n] and f32[n, T], lag 0 = the bar itself."""
    opened = pd.to_datetime(pd.Series(ts), unit="ms", utc=True).dt.tz_convert(NEW_YORK)
    half_hour = (opened.dt.hour * 2 + opened.dt.minute // 30).to_numpy()
    rows = np.unique(half_hour)
    mean = np.stack([weights[half_hour == row].mean(axis=0) for row in rows])
    figure, axes = new_figure((11.0, 4.8), grid=False)
    image = axes.imshow(
        100 * mean, aspect="auto", cmap="cividis", origin="upper", interpolation="nearest"
    )
    axes.set_xlabel("how many bars back the network looks (0 = the newest bar)")
    axes.set_ylabel("New York time of the forecast")
    axes.set_yticks(range(len(rows)), [f"{row // 2:02d}:{row % 2 * 30:02d}" for row in rows])
    figure.colorbar(image, ax=axes, label="share of attention, %", pad=0.015)
    return figure


def throughput(second: NDArray[np.float64], spans: Sequence[tuple[float, float, str]]) -> Figure:
    """Predictions per second over the wall time of the run: f64[n] seconds, one per prediction."""
    figure, axes = new_figure(WIDE)
    counts = np.bincount(second.astype(int))
    axes.fill_between(np.arange(len(counts)), counts, step="post", color=BLUE, alpha=0.35)
    axes.step(np.arange(len(counts)), counts, where="post", color=BLUE, linewidth=1.0)
    axes.set_xlabel("seconds since the first prediction")
    axes.set_ylabel("predictions a second")
    axes.set_ylim(0, None)
    axes.set_xlim(0, len(counts))
    _shade(axes, spans)
    return figure


def latency(
    second: NDArray[np.float64],
    milliseconds: NDArray[np.float64],
    spans: Sequence[tuple[float, float, str]],
) -> Figure:
    """Bar to prediction, median and 99th percentile for every second of wall time."""
    figure, axes = new_figure(WIDE)
    by_second = pd.Series(np.maximum(milliseconds, 0.5)).groupby(second.astype(int))
    for q, colour, dashes, name in (
        (0.5, BLUE, "-", "half of them are faster"),
        (0.99, VERMILLION, (0, (4, 1.2)), "99 % are faster"),
    ):
        line = by_second.quantile(q)
        axes.plot(line.index, line, color=colour, linestyle=dashes, linewidth=1.4, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    axes.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))
    axes.set_xlabel("seconds since the first prediction")
    axes.set_ylabel("from bar to prediction, ms")
    axes.legend(loc="upper left", frameon=False)
    axes.set_xlim(0, max(float(second.max()), 1.0))
    _shade(axes, spans)
    return figure


def write(
    directory: Path, title: str, summary: Mapping[str, object], sections: Sequence[Section]
) -> Path:
    """Write the PNGs and `report.html`, which needs no other file; its path."""
    directory.mkdir(parents=True, exist_ok=True)
    blocks = []
    for section in sections:
        blocks.append(f"<h2>{html.escape(section.title)}</h2>")
        blocks += [f"<p>{html.escape(text)}</p>" for text in section.paragraphs]
        for picture in section.pictures:
            png = picture.png()
            (directory / f"{picture.name}.png").write_bytes(png)
            blocks.append(
                f'<figure><img alt="{html.escape(picture.title)}"'
                f' src="data:image/png;base64,{base64.b64encode(png).decode()}">'
                f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
            )
        if section.rows:
            blocks.append(f"<table>{_table(section.rows)}</table>")
    rows = _table([(key.replace("_", " "), _shown(value)) for key, value in summary.items()])
    path = directory / "report.html"
    path.write_text(
        _PAGE.format(title=html.escape(title), rows=rows, body="\n".join(blocks)), encoding="utf-8"
    )
    return path


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ margin-top: 2.5rem; }}
img {{ width: 100%; height: auto; }} figure {{ margin: 1.5rem 0; }}
figcaption {{ color: #555; font-size: .92rem; }}
table {{ border-collapse: collapse; font-size: .92rem; }}
th, td {{ text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }}
th {{ font-weight: 500; color: #555; }} td {{ font-variant-numeric: tabular-nums; }}
</style></head><body>
<h1>{title}</h1>
{body}
<h2>All numbers</h2>
<table>{rows}</table>
</body></html>
"""


def new_figure(size: tuple[float, float], *, grid: bool = True) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis="y", color=LIGHT, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, axes


def _mark(axes: Axes, time: TradingTime, marks: Sequence[Mark]) -> None:
    """Vertical lines, their words above the picture on as many levels as they need."""
    level_ends = [-np.inf] * 5
    for mark in sorted(marks, key=lambda m: m.ts):
        x = float(time(mark.ts))
        axes.axvline(x, color=mark.colour, linewidth=1.3, linestyle=(0, (2, 1.5)))
        if not mark.text:
            continue
        width = 0.0085 * len(mark.text) * len(time)
        level = next((i for i, end in enumerate(level_ends) if end < x), 0)
        level_ends[level] = x + width
        axes.annotate(
            mark.text,
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 3 + 12 * level),
            textcoords="offset points",
            fontsize=9,
            color=mark.colour,
        )


def _shade(axes: Axes, spans: Sequence[tuple[float, float, str]]) -> None:
    for start, end, text in spans:
        axes.axvspan(start, end, color=GREY, alpha=0.18, linewidth=0)
        axes.annotate(
            text,
            ((start + end) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=BLACK,
        )


def _annual_percent(variance_per_minute: "pd.Series[float]") -> "pd.Series[float]":
    return (variance_per_minute * SESSIONS_PER_YEAR * 390) ** 0.5 * 100


def _date(ts: int) -> str:
    return pd.Timestamp(ts, unit="ms", tz="UTC").tz_convert(NEW_YORK).strftime("%-d %b")


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.01 else f"{value:,.2f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
