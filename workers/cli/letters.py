"""The group `dead-letter`: what was set aside and why, and sending it back once."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from workers.cli.shared import JsonOption, console, progress_bar, read_settings, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.letters import Wanted


app = typer.Typer(
    no_args_is_help=True,
    help="Messages that could not be used: look at them, send them back.",
)

LetterReason = Annotated[str | None, typer.Option("--reason", help="Part of the reason.")]

LetterTopic = Annotated[str | None, typer.Option("--topic", help="Where the message came from.")]

LetterSince = Annotated[
    datetime | None, typer.Option("--since", help="Set aside at this time or later, UTC.")
]

LetterUntil = Annotated[datetime | None, typer.Option("--until", help="Before this time, UTC.")]


@app.command("list")
def dead_letter_list(
    reason: LetterReason = None,
    topic: LetterTopic = None,
    since: LetterSince = None,
    until: LetterUntil = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 50,
    json: JsonOption = False,
) -> None:
    """What was set aside: when, from where, why, and how it begins; oldest first."""
    from collections import deque

    from rich.markup import escape
    from rich.table import Table

    from workers.letters import letters

    found, shown = 0, deque[dict[str, str | int | bool]](maxlen=limit)
    for letter in letters(read_settings(), _wanted(reason, topic, since, until)):
        found += 1
        shown.append(letter.summary())
    if json:
        show({"found": found, "letters": list(shown)}, json)
        return
    table = Table("id", "at (UTC)", "from", "reason", "bytes", "value", "sent back")
    for each in shown:
        at = f"{datetime.fromtimestamp(int(each['at_ms']) / 1_000, UTC):%Y-%m-%d %H:%M:%S}"
        back = "yes" if each["replayed"] else "cannot" if each["truncated"] else ""
        words = [str(each[name]) for name in ("source", "reason", "bytes", "value")]
        table.add_row(str(each["id"]), at, *map(escape, words), back)
    Console().print(table)
    console.print(f"{len(shown):,} of {found:,}")


@app.command("replay")
def dead_letter_replay(
    ids: Annotated[
        list[str] | None, typer.Argument(help="Only these, as [bold]list[/bold] names them.")
    ] = None,
    reason: LetterReason = None,
    topic: LetterTopic = None,
    since: LetterSince = None,
    until: LetterUntil = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it nothing is sent.")] = False,
    json: JsonOption = False,
) -> None:
    """Send messages back to where they came from, as they were; each one once.

    gpt-trader-stream dead-letter replay --reason volume         # says how many
    gpt-trader-stream dead-letter replay --reason volume --yes   # sends them
    """
    from workers.letters import replay

    wanted = _wanted(reason, topic, since, until, ids or ())
    with progress_bar() as progress:
        task = progress.add_task("letters", total=None)
        done = replay(
            read_settings(), wanted, dry_run=not yes, advance=lambda n: progress.advance(task, n)
        )
    show(done._asdict() | {"dry_run": not yes}, json)


def _wanted(
    reason: str | None,
    topic: str | None,
    since: datetime | None,
    until: datetime | None,
    ids: "Sequence[str]" = (),
) -> "Wanted":
    from workers.letters import Wanted

    since_ms, until_ms = (
        round(1_000 * at.replace(tzinfo=UTC).timestamp()) if at else None for at in (since, until)
    )
    return Wanted(reason, topic, since_ms, until_ms, frozenset(ids))
