"""The command `gpt-trader-stream`. A command imports what it needs when it runs: help comes at once."""

import sys
from enum import StrEnum
from typing import Annotated

import typer

from workers.cli import bench, learning, letters, loop, models
from workers.cli.shared import MODELS, OPERATIONS, console

app = typer.Typer(
    name="gpt-trader-stream",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Market bars in, forecasts out, over Kafka; and a loop that keeps them honest.

    [bold]demo[/bold] shows everything at once, on a Kafka of its own. By hand,
    each line in a terminal of its own:

      gpt-trader-stream kafka                # a real Kafka on port 9092
      gpt-trader-stream topics create
      gpt-trader-stream train --bars spy:2017 --out store/bundles --publish
      gpt-trader-stream inference            # up to one per partition
      gpt-trader-stream monitor
      gpt-trader-stream trainer
      gpt-trader-stream feed spy:2018-01..2018-03 --speed 6000

    Settings come from variables (KAFKA_BOOTSTRAP_SERVERS, DATABASE_URL,
    GPT_TRADER_STORE, ...) or from gpt-trader-stream.toml in this directory.
    """,
)
app.add_typer(loop.app)
app.add_typer(learning.app)
app.add_typer(models.app, name="models", rich_help_panel=MODELS)
app.add_typer(letters.app, name="dead-letter", rich_help_panel=OPERATIONS)
app.add_typer(bench.app, name="bench", rich_help_panel=OPERATIONS)


class LogForm(StrEnum):
    text = "text"
    json = "json"


@app.callback()
def _logs(
    log_form: Annotated[LogForm, typer.Option(help="Form of the log lines.")] = LogForm.text,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    from workers.logs import set_up

    set_up("cli", log_form.value, log_level)


def main() -> None:
    """Run the command; an error that somebody outside can mend is one line and status 1."""
    try:
        app()
    except Exception as error:
        if not _is_expected(error):
            raise
        console.print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False)
        raise SystemExit(1) from None


def _is_expected(error: Exception) -> bool:
    from pydantic import ValidationError

    from models.bundle import BundleRejected
    from models.dataset import BarsRejected
    from models.runtimes import RuntimeUnavailable
    from models.sessions import CalendarUnavailable
    from workers.errors import StreamError

    training = sys.modules.get("models.training")  # it needs torch
    if training and isinstance(error, training.TrainingRefused | training.Diverged):
        return True
    ours = StreamError | BundleRejected | BarsRejected | CalendarUnavailable | RuntimeUnavailable
    return isinstance(error, ours | ValidationError | OSError)
