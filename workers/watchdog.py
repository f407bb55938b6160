"""Finds partitions that do not move though messages wait in them, and shows how far each is behind."""

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from workers.config import Settings
from workers.kafka import GroupConsumer, Partition, ends, is_waiting
from workers.logs import event
from workers.service import Service

log = logging.getLogger(__name__)

ASKS = 4
"""How often in `http.stalled_after_s` the broker is asked about partitions that do not move."""


class Stalls:
    """A partition is stalled once it has stood still for `after_s` while messages waited in it.

    What a process did not look at cannot be called still: after half of `after_s` without a look
    the count begins anew.
    """

    def __init__(self, after_s: float, is_waiting: Callable[[Partition, int], bool | None]) -> None:
        self._after_s = after_s
        self._is_waiting = is_waiting
        self._places: dict[Partition, _Place] = {}
        self._looked_at = float("-inf")

    @property
    def still(self) -> Collection[Partition]:
        """Partitions that had not moved at the last look."""
        return [partition for partition, place in self._places.items() if place.still]

    def update(
        self, positions: Mapping[Partition, int], ends: Mapping[Partition, int], now_s: float
    ) -> dict[Partition, float]:
        """The stalled ones, each with the seconds that it has stood still."""
        blind = now_s - self._looked_at > self._after_s / 2
        self._looked_at = now_s
        self._places = {p: self._places.get(p, _Place(-1, now_s)) for p in positions}
        stalled = {}
        for partition, place in self._places.items():
            place.end = max(place.end, ends.get(partition, 0))
            place.still = place.position == positions[partition]
            place.position = positions[partition]
            if blind or not place.still or place.end <= max(place.position, place.empty_to):
                place.since = now_s
            elif now_s - place.since >= self._after_s:
                # Transaction markers are offsets too: whether a message waits, only reading tells.
                match self._is_waiting(partition, place.position):
                    case True:
                        stalled[partition] = now_s - place.since
                    case False:
                        place.empty_to, place.since = place.end, now_s
                    case None:  # nobody answers, which is no stall of ours: ask again soon
                        place.since = now_s - self._after_s * (1 - 1 / ASKS)
        return stalled


@dataclass
class _Place:
    position: int
    since: float
    """It has been there, with messages behind it."""
    still: bool = False
    end: int = 0
    """The furthest that was heard of."""
    empty_to: int = 0
    """Up to here there is nothing that a reader would ever see."""


class Watchdog:
    """Brings lag to /metrics, and stalled partitions to the log, to /metrics and to /healthz."""

    def __init__(
        self,
        consumer: GroupConsumer,
        settings: Settings,
        service: Service,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._consumer = consumer
        self._service = service
        self._clock = clock
        self._ask_every_s = service.http.stalled_after_s / ASKS
        self._ask_at = clock()
        self._named: set[Partition] = set()
        self._stalls = Stalls(
            service.http.stalled_after_s,
            lambda place, position: is_waiting(settings, *place, position),
        )

    def look(self, positions: Mapping[Partition, int]) -> None:
        """Compare with the last look; `positions` are the next offsets to process."""
        metrics, now = self._service.metrics, self._clock()
        asks = now >= self._ask_at
        heard = ends(self._consumer, asked=self._stalls.still if asks else ())
        self._ask_at = now + self._ask_every_s if asks else self._ask_at
        for (topic, partition), end in heard.items():
            behind = max(end - positions.get((topic, partition), end), 0)
            metrics.lag.labels(topic, str(partition)).set(behind)
        stalled = self._stalls.update(positions, heard, now)
        for topic, partition in stalled.keys() - self._named:
            place = topic, partition
            event(
                log,
                "partition_stalled",
                topic=topic,
                partition=partition,
                position=positions[place],
                end=heard.get(place),
                seconds=round(stalled[place], 1),
            )
        for topic, partition in self._named - stalled.keys():
            event(log, "partition_moves_again", topic=topic, partition=partition)
        self._named = set(stalled)
        metrics.stalled_partitions.set(len(stalled))
        self._service.stalled([f"{topic}[{partition}]" for topic, partition in sorted(stalled)])
