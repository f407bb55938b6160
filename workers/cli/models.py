"""The group `models`: who runs in which slot, and how to change it."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from workers.cli.shared import console, day, read_settings, user

if TYPE_CHECKING:
    from schemas.messages import Lifecycle


app = typer.Typer(
    no_args_is_help=True,
    help="Who runs in which slot, and how to change it; every change is audited.",
)


ab_app = typer.Typer(
    no_args_is_help=True, help="A/B tests: another bundle serves a share of the symbols."
)
app.add_typer(ab_app, name="ab")


Reason = Annotated[str, typer.Option(help="Why; it goes into the audit.")]

Who = Annotated[
    str, typer.Option(help="Who says so; your login name if left out.", show_default=False)
]


class TestedArm(StrEnum):
    b = "b"
    c = "c"


class Remedy(StrEnum):
    bias = "bias"
    weights = "weights"
    fine_tune = "fine_tune"
    full = "full"


@app.command("list")
def models_list() -> None:
    """The bundles of the registry, newest first, and who runs in which slot."""
    from rich.table import Table

    from schemas.messages import BUCKETS
    from workers.lifecycle import current
    from workers.store import Registry

    settings = read_settings()
    slots: dict[str | None, list[str]] = {}
    for slot, record in current(settings).items():
        share = f" {(record.share.end - record.share.first) / BUCKETS:.0%}" if record.share else ""
        slots.setdefault(record.bundle, []).append(f"{slot}{share}")
    table = Table("bundle", "slot", "parent", "made at (UTC)", "trained on")
    registry = Registry(settings.database_url)
    registry.create()
    for row in registry.bundles():
        made = datetime.fromtimestamp(row.created_at / 1_000, UTC)
        span = f"{day(row.data_from_ts)} to {day(row.data_to_ts)}"
        held = ", ".join(slots.get(row.version, []))
        table.add_row(row.version, held, row.parent or "", f"{made:%Y-%m-%d %H:%M}", span)
    Console().print(table)


@app.command("show")
def models_show(version: str) -> None:
    """The model card of a stored bundle, after every check it can fail."""
    from models.bundle import CARD
    from workers.bundles import bundle_uri, open_bundle

    settings = read_settings()
    open_bundle(settings, version)
    import fsspec

    with fsspec.open(f"{bundle_uri(settings, version)}/{CARD}", "rt") as card:
        typer.echo(card.read())


@app.command("diff")
def models_diff(first: str, second: str) -> None:
    """What is different in two stored bundles: settings, metrics, origin, and how far weights moved."""
    from rich.table import Table

    from workers.bundles import read_bundle
    from workers.lifecycle import differences

    settings = read_settings()
    table = Table("", first, second)
    for name, here, there in differences(
        read_bundle(settings, first), read_bundle(settings, second)
    ):
        table.add_row(name, here, there)
    Console().print(table)


@app.command("retrain")
def models_retrain(
    reason: Reason,
    who: Who = "",
    policy: Annotated[
        Remedy | None, typer.Option(help="Left out, the trainer chooses by the recent losses.")
    ] = None,
) -> None:
    """Ask the trainer for a challenger now; cool-down and daily limits do not hold for a person."""
    from workers.trainer import request

    asked = request(read_settings(), reason, who or user(), policy.value if policy else None)
    console.print(f"run {asked.id} is asked for; its steps are in `models audit`")


@app.command("promote")
def models_promote(
    version: str,
    reason: Reason,
    who: Who = "",
    at_once: Annotated[
        bool, typer.Option("--at-once", help="From the first bar that each replica reads next.")
    ] = False,
) -> None:
    """Make a stored bundle the champion, on your word and in your name."""
    from workers.lifecycle import promote as run

    _say_what_changed(run(read_settings(), version, reason, who or user(), at_once=at_once))


@app.command("rollback")
def models_rollback(reason: Reason, who: Who = "") -> None:
    """Bring the champion's parent back."""
    from workers.lifecycle import rollback as run

    _say_what_changed(run(read_settings(), reason, who or user()))


@app.command("retire")
def models_retire(
    reason: Reason,
    who: Who = "",
    version: Annotated[
        str | None, typer.Option("--bundle", help="Only this one; left out, all of them.")
    ] = None,
) -> None:
    """Send the challengers away."""
    from workers.lifecycle import retire as run

    _say_what_changed(*run(read_settings(), reason, who or user(), version))


@ab_app.command("start")
def ab_start(
    bundle: Annotated[str, typer.Option(help="Version of the stored bundle that is tested.")],
    share: Annotated[float, typer.Option(min=0.0001, max=0.9999, help="Of the symbols.")],
    reason: Reason,
    who: Who = "",
    salt: Annotated[
        str, typer.Option(help="Draws the symbols; left out, it is the bundle's version.")
    ] = "",
) -> None:
    """Let agents act on another bundle for a share of the symbols.

    They go on acting on what has the role champion; `arm` in the message says whose it is. The monitor
    ends an arm that is worse than the champion beyond doubt; to promote it is for a person.
    """
    from workers.arms import start as run

    _say_what_changed(run(read_settings(), bundle, share, reason, who or user(), salt))


@ab_app.command("stop")
def ab_stop(
    reason: Reason,
    who: Who = "",
    arm: Annotated[TestedArm | None, typer.Option(help="Left out, all of them.")] = None,
) -> None:
    """Give the symbols back to the champion."""
    from workers.arms import stop as run

    _say_what_changed(*run(read_settings(), reason, who or user(), arm.value if arm else None))


@app.command("audit")
def models_audit(
    verify: Annotated[bool, typer.Option("--verify", help="Check the chain of hashes.")] = False,
) -> None:
    """Every alarm, retrain and change of a slot, oldest first: when, who, from, to, why."""
    from rich.table import Table

    from workers.store import Registry

    registry = Registry(read_settings().database_url)
    registry.create()
    table = Table("at (UTC)", "who", "slot", "from", "to", "why")
    for row in registry.history():
        at = datetime.fromtimestamp(row.at / 1_000, UTC)
        who, slot, why = row.actor, row.slot, row.reason
        table.add_row(
            f"{at:%Y-%m-%d %H:%M:%S}", who, slot, row.from_bundle or "", row.to_bundle or "", why
        )
    Console().print(table)
    if verify:
        problems = registry.verify()
        for problem in problems:
            console.print(f"[bold red]{problem}[/]")
        if problems:
            raise typer.Exit(1)
        console.print(f"all {table.row_count} rows are as they were written")


def _say_what_changed(*records: "Lifecycle") -> None:
    if not records:
        console.print("nothing to change")
    for record in records:
        console.print(
            f"{record.slot}: {record.bundle or 'empty'} from bar time {record.effective_ts}"
        )
