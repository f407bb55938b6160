"""The quality loop on real bars that nobody shaped: SPY minutes, walked forward."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from models.pipeline import Recipe, fit_bundle
from models.targets import Target
from models.training import TrainingConfig
from workers.bars import read
from workers.config import MonitorSettings, Settings, TrainerSettings
from workers.rehearsal import Market, Strategy, Walk, walk

TARGET = Target(kind="volatility", horizon=30)
RECIPE = Recipe(
    network={"hidden": 32, "layers": 1, "window": 60},
    training=TrainingConfig(epochs=3),
)
SESSIONS_PER_YEAR = 252


def run(
    train: str = "spy:2017",
    bars: str = "spy:2018..2019",
    strategies: Sequence[Strategy] = ("never", "alarm"),
    out: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Alarms, retrains, promotions, and the loss saved against never retraining, as it comes out.

    `out` gets what happened as parquet and JSON files, for the report.
    """
    torch.set_num_threads(1)
    known, live = read(train), read(bars)
    say(f"training on {train}")
    champion = fit_bundle(known, (TARGET,), recipe=RECIPE, device="cpu")
    market = Market(champion, pd.concat([known.groupby("symbol").tail(20_000), live]))
    settings = Settings(monitor=MonitorSettings(), trainer=TrainerSettings())
    walks = {}
    for strategy in strategies:
        say(f"walking {bars}: {strategy}")
        walks[strategy] = walk(market, champion, strategy, int(live["ts"].min()), settings)
    never = walks["never"]
    if out is not None:
        _write(walks, out)
    sessions = live["ts"].floordiv(24 * 3_600_000).nunique()
    return {
        "sessions": int(sessions),
        "rows": [_row(found, never, sessions / SESSIONS_PER_YEAR) for found in walks.values()],
        "steps": [
            {
                "strategy": found.strategy,
                "what": step.what,
                "at": str(pd.Timestamp(step.ts, unit="ms")),
                "bundle": step.bundle,
            }
            for found in walks.values()
            if found.strategy == "alarm"
            for step in found.steps
        ],
    }


def _row(found: Walk, never: Walk, years: float) -> dict[str, Any]:
    loss, unanswered = found.outcomes["loss"].mean(), never.outcomes["loss"].mean()
    return {
        "policy": found.strategy,
        "loss": round(float(loss), 4),
        "reference_loss": round(float(found.outcomes["reference_loss"].mean()), 4),
        "loss_saved": round(float(1 - loss / unanswered), 4),
        "alarms": found.count("alarm"),
        "alarms_per_year": round(found.count("alarm") / years, 1),
        "retrains": found.count("challenger") + found.count("replaced"),
        "promotions": found.count("promoted"),
        "refusals": found.count("refused"),
        "rollbacks": found.count("rolled_back"),
        "cpu_seconds": round(found.cpu_seconds, 1),
    }


def _write(walks: dict[Strategy, Walk], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, found in walks.items():
        found.outcomes.to_parquet(out / f"{name}.parquet", index=False)
        pd.DataFrame(found.steps).to_json(out / f"{name}-steps.json", orient="records")
