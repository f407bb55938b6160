"""What joined predictions cost: losses for people, and the rows that the judge goes by.

The judge goes by running losses where the target has them (`models.running_loss`), else by the losses
of matured predictions.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.bundle import Bundle
from models.running_loss import RunningLosses
from models.scoring import loss
from models.targets import Target
from workers.joining import Join, Outcomes
from workers.verdicts import ROW, Rows

Floats = NDArray[np.float64]

FORGOTTEN_AFTER_MS = 7 * 24 * 3_600_000
"""A holder that has said nothing of a symbol for so long, and a horizon, is not kept in snapshots."""


class Scorer:
    """Of one `Join`, whose symbols and holders it goes by; pure, no Kafka in it."""

    def __init__(
        self, join: Join, decisive: Target, bundle_of: Callable[[str], Bundle | None]
    ) -> None:
        """`bundle_of` gives a bundle of the store, None where it cannot be read."""
        self._join, self._decisive, self._bundle_of = join, decisive, bundle_of
        self._running = RunningLosses(decisive, join.spec)
        self._places: dict[tuple[int, int], int] = {}
        """Of running losses, by slot and holder."""
        self._free: list[int] = []

    def losses(self, outcomes: Outcomes) -> tuple[Floats, Floats]:
        """Loss and reference loss f64[n]; NaN where the bundle cannot be read."""
        losses, reference_losses = np.full((2, len(outcomes)), np.nan)
        for holder, k, at in self.groups(outcomes):
            target, label = self._join.targets[k], outcomes["label"][at]
            said = self._reference(holder, target, outcomes["log_variances"][at])
            if said is not None:
                with np.errstate(over="ignore"):  # infinite, so not scored
                    losses[at] = loss(target, outcomes["value"][at], label)
                    reference_losses[at] = loss(target, said, label)
        return losses, reference_losses

    def groups(self, outcomes: Outcomes) -> Iterator[tuple[int, int, NDArray[np.intp]]]:
        """(holder, target, rows) of every pair that occurs."""
        n = len(self._join.targets) + 1
        pairs, place = np.unique(outcomes["holder"] * n + outcomes["target"], return_inverse=True)
        for i, pair in enumerate(pairs.tolist()):
            yield pair // n, pair % n, np.flatnonzero(place == i)

    def matured(self, outcomes: Outcomes, losses: Floats, reference_losses: Floats) -> Rows:
        """For the judge, ROW of those of the decisive target; all have a loss."""
        own = outcomes["target"] == self._join.targets.index(self._decisive)
        return self._rows(outcomes[own], losses[own], reference_losses[own])

    def running(self, outcomes: Outcomes) -> Rows:
        """For the judge, ROW of the bars that close with a running loss, from the second join."""
        said = np.full((len(outcomes), 2), np.nan)
        for holder, _, at in self.groups(outcomes):
            reference = self._reference(holder, self._decisive, outcomes["log_variances"][at])
            if reference is not None:
                said[at, 0], said[at, 1] = outcomes["value"][at], reference
        known = np.isfinite(said).all(axis=1)
        outcomes, said = outcomes[known], said[known]
        ts, next_ts = (np.ascontiguousarray(outcomes[name]) for name in ("ts", "matured_ts"))
        r2 = np.ascontiguousarray(outcomes["label"])
        found = self._running.update(self._places_of(outcomes), ts, next_ts, r2, said)
        scored = np.isfinite(found).all(axis=1)
        rows = self._rows(outcomes[scored], *found[scored].T)
        rows["ts"] = rows["matured_ts"]
        return rows

    def drop(self, partition: int) -> None:
        """Forget a partition, before the join does."""
        for slot, holder in [key for key in self._places if self._is_of(partition, key)]:
            self._give_back((slot, holder))

    def export(self, partition: int) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and JSON-able meta of one partition: what `load` takes."""
        own = [key for key in self._places if self._is_of(partition, key)]
        last_ts = self._running.last_ts[[self._places[key] for key in own]]
        oldest = int(last_ts.max(initial=0)) - FORGOTTEN_AFTER_MS
        oldest -= self._decisive.horizon * self._join.spec.interval_ms
        for key, ts in zip(own, last_ts.tolist(), strict=True):
            if ts < oldest:
                self._give_back(key)
        own = [key for key in own if key in self._places]
        places = np.array([self._places[key] for key in own], np.int64)
        return dict(self._running.export(places)), {
            "names": [self._join.symbols[slot][1] for slot, _ in own],
            "holders": [list(self._join.holders[holder]) for _, holder in own],
        }

    def load(
        self, partition: int, arrays: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]
    ) -> None:
        """Put a partition that was dropped back as it was, after the join has been."""
        keys = [
            (self._join.slot_of(partition, name), self._join.holder_of(*holder))
            for name, holder in zip(meta["names"], meta["holders"], strict=True)
        ]
        self._running.load(np.array([self._place(key) for key in keys], np.int64), arrays)

    def _reference(self, holder: int, target: Target, log_variances: Floats) -> Floats | None:
        bundle = self._bundle_of(self._join.holders[holder].bundle)
        if bundle is None or target not in bundle.config.targets:
            return None
        reference = bundle.config.references[bundle.config.targets.index(target)]
        return reference.forecast(target, log_variances)

    def _rows(self, outcomes: Outcomes, losses: Floats, reference_losses: Floats) -> Rows:
        rows = np.zeros(len(outcomes), ROW)
        for name in ("ts", "matured_ts", "holder"):
            rows[name] = outcomes[name]
        rows["symbol"] = outcomes["slot"]
        distinct, place = np.unique(rows["symbol"], return_inverse=True)
        symbols = self._join.symbols
        partitions = np.array([symbols[slot][0] for slot in distinct.tolist()], np.int64)
        rows["partition"] = partitions[place]
        rows["loss"], rows["reference_loss"] = losses, reference_losses
        return rows

    def _places_of(self, outcomes: Outcomes) -> NDArray[np.int64]:
        n = len(self._join.holders)
        distinct, row = np.unique(outcomes["slot"] * n + outcomes["holder"], return_inverse=True)
        places = [self._place(divmod(code, n)) for code in distinct.tolist()]
        return np.array(places, np.int64)[row]

    def _place(self, key: tuple[int, int]) -> int:
        if key not in self._places:
            place = self._free.pop() if self._free else len(self._places)
            self._running.grow(max(64, 2 * place) if place >= self._running.capacity else 0)
            self._places[key] = place
        return self._places[key]

    def _give_back(self, key: tuple[int, int]) -> None:
        place = self._places.pop(key)
        self._running.reset(np.array([place]))
        self._free.append(place)

    def _is_of(self, partition: int, key: tuple[int, int]) -> bool:
        return self._join.symbols[key[0]][0] == partition
