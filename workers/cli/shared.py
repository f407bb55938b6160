"""What the commands share: the console, settings, bars, progress, and how a result is shown."""

from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pandas as pd
    from rich.progress import Progress

    from workers.config import Settings

START, WORKERS, MODELS, OPERATIONS = "Start here", "Workers", "Models", "Operations"

console = Console(stderr=True)

BARS_HELP = """Where the bars come from: [bold]spy[/bold] (SPY minutes 2017-2019), a part of them as
[bold]spy:2018-01..2018-03[/bold], or a parquet file with the columns symbol, ts (epoch ms UTC of
the bar's open), open, high, low, close, volume."""


class Delivery(StrEnum):
    exactly_once = "exactly_once"
    at_least_once = "at_least_once"


JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


def read_settings(replica: str | None = None, port: int | None = None) -> "Settings":
    from workers.config import Settings

    settings = Settings()
    if replica is not None:
        settings = settings.model_copy(update={"replica": replica})
    if port is not None:
        http = settings.http.model_copy(update={"port": port})
        settings = settings.model_copy(update={"http": http})
    return settings


def read_bars(source: str) -> "pd.DataFrame":
    from workers.bars import read

    return read(source)


def progress_bar() -> "Progress":
    from workers.progress import bar_progress

    return bar_progress(console)


@contextmanager
def told() -> "Iterator[Callable[[str, float], None]]":
    """A bar that shows what is being done and which share of it is done."""
    with progress_bar() as progress:
        task = progress.add_task("starting", total=100)
        yield lambda what, share: progress.update(task, description=what, completed=100 * share)
        progress.update(task, description="done", completed=100)


def user() -> str:
    from getpass import getuser

    return getuser()


def day(ts: int) -> str:
    return f"{datetime.fromtimestamp(ts / 1_000, UTC):%Y-%m-%d}"


def show(result: dict[str, object], json: bool) -> None:
    if json:
        from json import dumps

        typer.echo(dumps(result))
        return
    for name, value in result.items():
        typer.echo(f"{name.replace('_', ' '):34} {_said(value)}")


def _said(value: object) -> str:
    """A number with its thousands, a table one row a line, anything else as it is."""
    if isinstance(value, list):
        return "".join(f"\n  {_said(row)}" for row in value)
    if isinstance(value, dict):
        return "  ".join(f"{name} {_said(each)}" for name, each in value.items())
    return f"{value:,}" if isinstance(value, int | float) else str(value)
