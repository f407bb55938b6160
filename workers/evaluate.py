"""The command `evaluate`: bars of any market in, JSON and an HTML page out."""

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from models.ablation import ablate
from models.dataset import load_bars
from models.evaluation import Protocol, Watch, evaluate
from models.panel import build, infer_spec
from models.targets import Target
from workers import evaluate_report

if TYPE_CHECKING:
    from collections.abc import Iterator


def run(
    bars: pd.DataFrame,
    target: Target,
    protocol: Protocol,
    *,
    json_path: Path | None = None,
    report_path: Path | None = None,
    timezone: str = "auto",
    ablations: bool = False,
    keep: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate every model on `bars`, write what was asked for, print a table; the result.

    `keep` is a folder for what finished fits said. Raises BarsRejected; TooShort where the bars do not reach.
    """
    console = console or Console(stderr=True)
    bars = load_bars(bars)
    _set_threads(protocol.threads)
    with _bar(console) as progress:
        task = progress.add_task("features", total=len(bars))
        panel = build(bars, infer_spec(bars, timezone), target, lambda n: progress.advance(task, n))
        result = evaluate(panel, protocol, _Bar(progress), keep)
        result["protocol"] |= {
            "bars_impossible": bars.attrs["rejected"],
            "bars_twice": bars.attrs["duplicates"],
        }
        if ablations:
            result["ablations"] = ablate(panel, protocol, _Bar(progress), keep=keep)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if report_path is not None:
        evaluate_report.write(report_path, result)
    console.print(_table(result))
    for text in evaluate_report.in_words(result):
        console.print(text, highlight=False)
    return result


class _Bar(Watch):
    """One line that moves; where there is no terminal, one line for each fit."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._what = progress, ""
        self._task = progress.add_task("models", total=1.0)

    def at(self, what: str, share: float) -> None:
        self._progress.update(self._task, description=what, completed=share)
        if what != self._what and not self._progress.console.is_terminal:
            self._progress.console.print(f"{share:4.0%} {what}", highlight=False)
        self._what = what


@contextmanager
def _bar(console: Console) -> "Iterator[Progress]":
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def _set_threads(threads: int) -> None:
    if threads:
        import torch

        torch.set_num_threads(threads)


def _table(result: dict[str, Any]) -> Table:
    measure = evaluate_report.measure_of(result)
    rivals = list(result["rows"][-1]["dm_vs"])
    table = Table("model", measure, *(f"vs {rival}" for rival in rivals))
    for row in result["rows"]:
        sd = f" ± {row[f'{measure}_sd']:.4f}" if f"{measure}_sd" in row else ""
        changes = [
            f"{100 * row['loss_change_vs'][rival]:+.1f} %" if rival in row["dm_vs"] else ""
            for rival in rivals
        ]
        table.add_row(row["model"], f"{row[measure]:.5g}{sd}", *changes)
    return table
