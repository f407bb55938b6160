"""Where the skill of the network comes from: the same training with one thing changed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.evaluation import Protocol, Watch
from models.features import FEATURE_NAMES
from models.levels import levels
from models.panel import Floats, Ints, Panel, Part, walk
from models.recurrent import Options, Recurrent
from models.scoring import loss
from models.shelf import Shelf
from models.significance import by_time, diebold_mariano

FAMILIES: Final[Mapping[str, tuple[str, ...]]] = {
    "realised variance and ranges": ("log_rv", "log_gk", "log_calm", "log_mean", "vol_of_vol"),
    "season and yesterday": ("season_", "expected_", "yesterday_", "volume_season"),
    "time of day and week": ("day_", "week_"),
    "volume": ("volume_", "money_flow", "zero_volume"),
    "direction and shape": ("trend_", "rsi_", "stochastic", "macd_", "skewness", "autocorrelation"),
    "gaps and sessions": ("gap_", "log_gap", "closed_time", "session_", "bars_since", "time_since"),
}
"""Features whose names begin so."""
OWN_NETWORKS: Final = 5
"""Symbols for which "one network a symbol" is tried: those with the most bars."""


@dataclass(frozen=True)
class Variant:
    name: str
    network: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """First letters of the features that are hidden."""
    pooled: bool = True


def variants(options: Options) -> list[Variant]:
    T = int(options.network.get("window", 30))
    changes: list[tuple[str, dict[str, Any]]] = [
        ("no attention", {"attention": "none"}),
        ("additive attention", {"attention": "additive"}),
        ("no bias by lag", {"lag_bias": "none"}),
        ("ALiBi bias by lag", {"lag_bias": "alibi"}),
        ("attention over 10 bars", {"window": 10}),
        ("attention over 30 bars", {"window": 30}),
        (f"attention over {2 * T} bars", {"window": 2 * T}),
        ("no skip", {"skip": False}),
        ("no gate", {"gate": False}),
        ("GRU", {"cell": "gru"}),
        ("two layers", {"layers": 2}),
    ]
    windows: list[tuple[str, dict[str, Any]]] = [
        (f"windows of {T} bars, no state", {}),
        ("windows, no attention", {"attention": "none"}),
        ("windows, additive attention", {"attention": "additive"}),
        ("windows, self-attention", {"attention": "self"}),
        (
            "windows, cross-attention to hours",
            {"attention": "cross", "slower": 12, "window": max(T, 36)},
        ),
        ("windows, bidirectional", {"bidirectional": True}),
        ("windows of 10 bars", {"window": 10}),
    ]
    return [
        Variant("as it is"),
        *(Variant(name, network) for name, network in changes),
        *(Variant(name, {"mode": "window", **network}) for name, network in windows),
        Variant("one network a symbol", pooled=False),
        Variant("trained on squared error of the log", options={"loss": {"volatility": "mse"}}),
        Variant("levels of variance as they are", options={"augmentation": {"level": 0.0}}),
        *(Variant(f"without {name}", without=prefixes) for name, prefixes in FAMILIES.items()),
    ]


def ablate(
    panel: Panel,
    protocol: Protocol,
    watch: Watch | None = None,
    seeds: int = 2,
    only: Sequence[str] | None = None,
    keep: Path | None = None,
) -> list[dict[str, Any]]:
    """One row a variant, on the out-of-sample rows of one fit; the first row is the default.

    `keep` as in `models.evaluation.evaluate`.
    """
    watch = watch or Watch()
    part = walk(panel, protocol.out_of_sample, 1, protocol.validation)[0]
    todo = [v for v in variants(protocol.options) if only is None or v.name in only]
    shelf = Shelf(
        keep, panel, protocol.model_dump(exclude={"refits", "threads", "tree_rounds", "level_days"})
    )
    rows: list[dict[str, Any]] = []
    default: Floats | None = None
    for i, variant in enumerate(todo):
        watch.at(f"ablation: {variant.name}", i / len(todo))
        fitted = shelf.take(
            variant.name.replace(" ", "_"),
            {"variant": asdict(variant), "seeds": seeds},
            partial(_fitted, panel, part, protocol.options, variant, seeds),
        )
        taken, losses = fitted["taken"], fitted["losses"]
        default = losses if default is None else default
        rival = default[taken]
        ts = panel.ts[part.test[taken]]
        test = diebold_mariano(by_time(ts, losses - rival), panel.target.horizon)
        rows.append(
            {
                "variant": variant.name,
                "loss": float(losses.mean()),
                "change": float(losses.mean() / rival.mean() - 1),
                "p_value": test.p_value,
                "n": len(losses),
                "seeds": seeds,
                "seconds": float(fitted["seconds"]),
            }
        )
    watch.at("ablations", 1.0)
    return rows


def _fitted(
    panel: Panel, part: Part, options: Options, variant: Variant, seeds: int
) -> dict[str, NDArray[Any]]:
    """Places in `part.test`, the losses there as a mean over seeds, and seconds."""
    started = perf_counter()
    changed = Options.model_validate({**options.model_dump(), **variant.options})
    hidden = [i for i, name in enumerate(FEATURE_NAMES) if name.startswith(variant.without)]
    networks = Recurrent(
        variant.name,
        changed,
        variant.network,
        range(seeds),
        hidden=hidden if variant.without else (),
    )
    every = np.arange(len(part.test))
    groups = [(panel, part, every)] if variant.pooled else list(_alone(panel, part))
    places, found = [], []
    for own, own_part, taken in groups:
        networks.trained.clear()
        networks.fit(own, own_part)
        y = own.y[own_part.test]
        losses = []
        for seed in networks.seeds:
            values = networks.predict_seed(own, own_part.test, seed)
            valid = networks.predict_seed(own, own_part.valid, seed)
            level, _ = levels(own, valid, own_part.valid)
            losses.append(loss(own.target, values + level, y))
        places.append(taken)
        found.append(np.mean(losses, axis=0))
    return {
        "taken": np.concatenate(places),
        "losses": np.concatenate(found),
        "seconds": np.array(perf_counter() - started),
    }


def _alone(panel: Panel, part: Part) -> Iterator[tuple[Panel, Part, Ints]]:
    """The symbols with the most training rows, each as a panel of its own, and its places in the test."""
    counts = np.bincount(panel.symbol[part.fit], minlength=len(panel.histories))
    for i in np.sort(np.argsort(-counts, kind="stable")[:OWN_NETWORKS]):
        start, stop = int(panel.bounds[i]), int(panel.bounds[i + 1])
        own = replace(
            panel,
            histories=(panel.histories[i],),
            bounds=np.array([0, stop - start]),
            x=panel.x[start:stop],
        )
        fit, valid, test = (
            rows[(rows >= start) & (rows < stop)] - start
            for rows in (part.fit, part.valid, part.test)
        )
        places = np.flatnonzero((part.test >= start) & (part.test < stop))
        yield own, replace(part, fit=fit, valid=valid, test=test), places
