import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from workers import report
from workers.report import Mark, Picture, Section, TradingTime

MINUTE = 60_000
DAY = 86_400_000
OPEN = 1_514_903_400_000


def sessions(days: int, bars: int = 391) -> NDArray[np.int64]:
    return (OPEN + DAY * np.arange(days)[:, None] + MINUTE * np.arange(bars)).ravel()


def make_outcomes(days: int = 3, role: str = "champion", bundle: str = "aaaa") -> pd.DataFrame:
    ts = sessions(days)
    x = np.random.default_rng(1).normal(size=(4, len(ts)))
    return pd.DataFrame(
        {
            "ts": ts,
            "role": role,
            "bundle": bundle,
            "value": -16 + x[0],
            "label": -16 + x[1],
            "loss": x[2] ** 2,
            "reference_loss": x[3] ** 2,
            "statistic": np.abs(x[2].cumsum()),
        }
    )


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(match=lambda a: hasattr(a, "get_text"))]  # type: ignore[attr-defined]


def test_nights_take_no_room_on_the_axis() -> None:
    time = TradingTime(sessions(3))
    assert len(time) == 3
    last, first = time(OPEN + 390 * MINUTE), time(OPEN + DAY)
    assert first == 1
    assert last == pytest.approx(1, abs=0.01)


def test_time_in_trading_hours_goes_on_evenly_and_a_moment_at_night_is_the_close() -> None:
    time = TradingTime(sessions(2))
    x = time(sessions(1))
    np.testing.assert_allclose(np.diff(x), 1 / 391)
    assert time(OPEN + 600 * MINUTE) == 1
    assert time(OPEN - DAY) == 0


@pytest.mark.parametrize("days", [1, 3, 60])
def test_there_are_never_more_than_a_dozen_dates(days: int) -> None:
    ts = sessions(days, bars=30)
    figure = Figure()
    axes = figure.add_subplot()
    TradingTime(ts).label(axes)
    assert 1 <= len(axes.get_xticks()) <= 12
    assert axes.get_xticklabels()[0].get_text() == "2 Jan"


def test_volatility_is_drawn_in_percent_a_year() -> None:
    quiet = make_outcomes().assign(label=np.log(0.16**2 / 252 / 390), value=-20.0)
    figure = report.volatility(quiet, [], "SPY")
    realised = figure.axes[0].lines[1]
    np.testing.assert_allclose(np.asarray(realised.get_ydata()), 16)
    assert "% a year" in figure.axes[0].get_ylabel()


@pytest.mark.parametrize(
    "figure",
    [
        report.volatility(make_outcomes(), [Mark(OPEN + DAY, "swap")], "SPY"),
        report.statistic(make_outcomes(), 12.0, [Mark(OPEN + DAY, "alarm")]),
        report.losses(make_outcomes(), [Mark(OPEN + DAY, "kill")]),
        report.attention(sessions(2), np.full((782, 30), 1 / 30, np.float32)),
        report.throughput(np.linspace(0, 9, 50), [(2, 3, "killed")]),
        report.latency(np.linspace(0, 9, 50), np.full(50, 7.0), [(2, 3, "killed")]),
    ],
    ids=["volatility", "statistic", "losses", "attention", "throughput", "latency"],
)
def test_every_picture_says_what_its_axes_are_and_can_be_saved(figure: Figure) -> None:
    axes = figure.axes[0]
    assert axes.get_ylabel()
    assert axes.get_xlabel() or re.match(r"\d+ \w+", axes.get_xticklabels()[0].get_text())
    png = Picture("x", "A message", "How to read it", figure).png()
    assert png.startswith(b"\x89PNG")
    assert "A message" in texts(figure)


def test_marks_close_to_each_other_do_not_share_a_line() -> None:
    marks = [Mark(OPEN + DAY + i * MINUTE, f"something that happened {i}") for i in range(3)]
    axes = report.losses(make_outcomes(), marks).axes[0]
    heights = {t.get_position()[1] for t in axes.texts if "happened" in t.get_text()}
    assert len(heights) == 3


def test_a_run_without_a_challenger_has_a_picture_of_losses_all_the_same() -> None:
    legend = report.losses(make_outcomes(), []).axes[0].get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["frozen reference (EWMA)", "champion"]


def test_two_challengers_are_two_lines_and_one_entry_of_the_legend() -> None:
    parts = [make_outcomes()]
    parts += [make_outcomes(role="challenger", bundle=name) for name in ("bbbb", "cccc")]
    axes = report.losses(pd.concat(parts), []).axes[0]
    assert len(axes.lines) == 4
    legend = axes.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 3


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_no_other_file_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    picture = Picture("losses", "a < b", "it's", report.losses(make_outcomes(), []))
    sections = [Section("<What>", ["one & two"], [picture])]
    path = report.write(tmp_path / "new", "Run", {"max_abs_difference": 1.5e-7}, sections)
    text = path.read_text()
    sources = Page(text).sources
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "&lt;What&gt;" in text
    assert "one &amp; two" in text
    assert "1.5e-07" in text
    assert (tmp_path / "new" / "losses.png").exists()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234567, "1,234,567"), (2.5e-7, "2.5e-07"), (0.0, "0"), (12.345, "12.35"), (["a", "b"], "a, b"), (None, "")],
)  # fmt: skip
def test_numbers_are_shown_for_people(tmp_path: Path, value: object, shown: str) -> None:
    text = report.write(tmp_path, "Run", {"k": value}, []).read_text()
    assert f"<td>{shown}</td>" in text, json.dumps(value)
