"""Which answer to a break pays: share of the excess loss won back, and the CPU seconds it costs.

Breaks are simulated, so when they come is known. Both change what the features mean: the feed loses
opens, highs and lows, or bad prints widen every bar. (A market whose session pattern turns round
costs the reference more than the champion: there is no excess to win back.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from models.bundle import Bundle
from models.pipeline import Recipe, fit_bundle
from models.simulation import Scenario, Simulator
from models.targets import Target
from models.training import TrainingConfig
from workers.config import MonitorSettings, Settings, TrainerSettings
from workers.rehearsal import STRATEGIES, Market, Strategy, Walk, walk

SESSION_BARS = 390
DAY_MS, MINUTE_MS = 24 * 3_600_000, 60_000
FIRST_TS = 1_514_903_400_000
TRAINING_SESSIONS, CALM_SESSIONS = 20, 3
TARGET = Target(kind="volatility", horizon=30)
RECIPE = Recipe(
    network={"hidden": 32, "layers": 1, "window": 30},
    training=TrainingConfig(epochs=4),
    validation=0.4,
    arl0_bars=4_000,
)
SETTINGS = Settings(
    monitor=MonitorSettings(max_shadow_bars=3_000),
    trainer=TrainerSettings(history_bars=8 * SESSION_BARS),
)
BREAKS = ("opens, highs and lows lost", "bars widened by bad prints")
WIDENED = 0.002
"""Of the price, to each side."""


def run(
    sessions_after: int = 8,
    symbols: int = 4,
    seeds: Sequence[int] = (1,),
    strategies: Sequence[Strategy] = STRATEGIES,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """`recovered` counts from one session after the break to the end; 1 is as good as before it.

    Of a policy it is that of all markets together: where a break cost nothing there is nothing to win.
    """
    torch.set_num_threads(1)
    rows = []
    for name in BREAKS:
        for seed in seeds:
            bars, break_ts = broken_bars(name, sessions_after, symbols, seed)
            champion = champion_before(bars)
            market = Market(champion, bars)
            from_ts = FIRST_TS + TRAINING_SESSIONS * DAY_MS
            walks = {}
            for strategy in strategies:
                say(f"{name}, seed {seed}: {strategy}")
                walks[strategy] = walk(market, champion, strategy, from_ts, SETTINGS)
            rows += [
                {"break": name, "seed": seed, **measured(found, walks["never"], break_ts)}
                for found in walks.values()
            ]
    return {"rows": _by_policy(rows), "runs": rows}


def measured(found: Walk, never: Walk, break_ts: int) -> dict[str, Any]:
    """Excess: loss minus reference loss, above what it was before the break."""
    settled_ts = break_ts + DAY_MS
    excess = excess_after(found, break_ts, settled_ts)
    unanswered = excess_after(never, break_ts, settled_ts)
    return {
        "policy": found.strategy,
        "recovered": round(1 - excess / unanswered, 3),
        "excess_loss": round(excess, 4),
        "unanswered_loss": round(unanswered, 4),
        "cpu_seconds": round(found.cpu_seconds, 1),
        "alarms": found.count("alarm"),
        "new_champions": found.count("promoted") + found.count("replaced"),
    }


def excess_after(found: Walk, break_ts: int, settled_ts: int) -> float:
    difference = found.outcomes["loss"] - found.outcomes["reference_loss"]
    ts = found.outcomes["ts"]
    return float(difference[ts >= settled_ts].mean() - difference[ts < break_ts].mean())


def champion_before(bars: pd.DataFrame) -> Bundle:
    """Trained on the sessions before the walk begins."""
    known = bars[bars["ts"] < FIRST_TS + TRAINING_SESSIONS * DAY_MS]
    return fit_bundle(known, (TARGET,), recipe=RECIPE, device="cpu")


def broken_bars(
    name: str, sessions_after: int, symbols: int, seed: int
) -> tuple[pd.DataFrame, int]:
    """Bars with the break, and its bar time: the open of a session."""
    sessions = TRAINING_SESSIONS + CALM_SESSIONS + sessions_after
    minutes = np.arange(SESSION_BARS) * MINUTE_MS
    ts = (FIRST_TS + DAY_MS * np.arange(sessions)[:, None] + minutes).ravel().astype(np.int64)
    break_ts = FIRST_TS + (TRAINING_SESSIONS + CALM_SESSIONS) * DAY_MS
    bars = Simulator(Scenario(symbols=symbols), seed).run(ts).frame()
    after = bars["ts"] >= break_ts
    if name == BREAKS[0]:
        for column in ("open", "high", "low"):
            bars.loc[after, column] = bars.loc[after, "close"]
    else:
        bars.loc[after, "high"] *= 1 + WIDENED
        bars.loc[after, "low"] *= 1 - WIDENED
    return bars, break_ts


def _by_policy(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "policy": policy,
            "recovered": round(1 - _sum(same, "excess_loss") / _sum(same, "unanswered_loss"), 3),
            "cpu_seconds": round(_sum(same, "cpu_seconds") / len(same), 1),
        }
        for policy in dict.fromkeys(row["policy"] for row in rows)
        if (same := [row for row in rows if row["policy"] == policy])
    ]


def _sum(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(sum(row[name] for row in rows))
