"""The picture that goes with an alarm: the statistic, its threshold, and since when it is too high."""

import io
import logging
from collections.abc import Sequence

import fsspec
import numpy as np
from matplotlib.dates import date2num
from matplotlib.figure import Figure

from schemas.messages import Degradation
from workers.config import Settings
from workers.logs import event
from workers.watch import Point

log = logging.getLogger(__name__)


def picture_uri(settings: Settings, alarm_id: str) -> str:
    return f"{settings.store}/alarms/{alarm_id}.png"


def store_picture(settings: Settings, alarm: Degradation, trace: Sequence[Point]) -> None:
    """Draw and store it where the event says; a store that is gone costs the picture only."""
    try:
        files, path = fsspec.url_to_fs(picture_uri(settings, alarm.id))
        files.makedirs(path.rpartition("/")[0], exist_ok=True)
        files.pipe_file(path, drawn(alarm, trace))
    except OSError as error:
        event(log, "picture_not_stored", alarm=alarm.id, reason=error)


def drawn(alarm: Degradation, trace: Sequence[Point]) -> bytes:
    """PNG bytes."""
    ts, statistic, threshold = np.array(trace, np.float64).reshape(-1, 3).T
    when = ts.astype("datetime64[ms]")
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(when, statistic, lw=1, label=alarm.detector)
    axes.plot(when, threshold, lw=1, ls="--", label="threshold")
    since, until = date2num(np.array([alarm.since_ts, alarm.ts], "datetime64[ms]"))  # type: ignore[no-untyped-call]
    axes.axvspan(since, until, alpha=0.2, color="C3")
    axes.set_title(
        f"{alarm.bundle} is worse than its reference on {alarm.target}: "
        f"{alarm.excess_loss:+.3g} a forecast"
    )
    axes.legend(loc="upper left")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
