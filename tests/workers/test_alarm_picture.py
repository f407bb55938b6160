"""An alarm's picture is where its event says it is; without a store only the picture is missing."""

from pathlib import Path

from schemas.messages import Degradation
from workers.alarm_picture import picture_uri, store_picture
from workers.config import Settings
from workers.watch import Point

TRACE = [Point(60_000 * i, max(0.0, i - 20.0), 10.0) for i in range(40)]


def make_alarm(settings: Settings) -> Degradation:
    return Degradation(
        id="a1",
        bundle="b",
        target="volatility_5",
        detector="cusum",
        statistic=11.0,
        threshold=10.0,
        arl0=1_000,
        since_ts=20 * 60_000,
        ts=31 * 60_000,
        symbols=["A"],
        excess_loss=0.4,
        excess_by_symbol={"A": 0.4},
        picture=picture_uri(settings, "a1"),
        issued_at=0,
    )


def test_the_picture_is_where_the_event_says(tmp_path: Path) -> None:
    alarm = make_alarm(settings := Settings(store=str(tmp_path)))
    store_picture(settings, alarm, TRACE)
    assert alarm.picture is not None
    assert Path(alarm.picture).read_bytes().startswith(b"\x89PNG")


def test_an_alarm_before_anything_was_traced_has_a_picture_too(tmp_path: Path) -> None:
    settings = Settings(store=str(tmp_path))
    store_picture(settings, make_alarm(settings), [])
    assert (tmp_path / "alarms" / "a1.png").stat().st_size > 1_000


def test_a_store_that_is_gone_costs_the_picture_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    settings = Settings(store=str(tmp_path / "file"))
    store_picture(settings, make_alarm(settings), TRACE)
