"""Nothing lost, nothing twice, for as long as one likes: kills, rebalances, swaps, a broker that is gone."""

import random
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from models.bundle import Bundle
from schemas.topics import BARS
from workers.bench.fixtures import Tell, default_bundle, quietly, simulated_bars
from workers.bench.stage import NothingHappened, appoint, environment, with_sections
from workers.config import Settings
from workers.feed import Limits, feed
from workers.fleet import Fleet
from workers.kafka import GroupLag, create_topics, group_offsets
from workers.local_kafka import LocalKafka
from workers.proof import compare, read_bars, read_predictions, undisturbed
from workers.schedule import Schedule

Delivery = Literal["exactly_once", "at_least_once"]

ALWAYS = ("a", "b")
NOW_AND_THEN = "c"
"""Comes and goes: each time the partitions are shared out anew."""
SWAPS = (0.4, 0.7)
"""At which share of the bars another champion is named, from the first bar time that is not sent yet."""
HEARD_WITHIN_S = 3.0
"""So long the feed waits then, so that no replica passes that time before it has heard."""
BROKER_GONE_AT = 0.55
PATIENCE_S = 900.0
MAX_LAG = 100_000
PEACE_FROM = 2_000
"""So few bars are left that the kills end: the last replica that was started has to finish."""
LOOK_EVERY_S = 0.1


def run(
    bars: int = 1_000_000,
    symbols: int = 200,
    delivery: Delivery = "exactly_once",
    kill_every_s: float = 5.0,
    rebalance_every_s: float = 60.0,
    broker_gone_s: float = 60.0,
    seed: int = 1,
    tell: Tell = quietly,
) -> dict[str, Any]:
    """Stream so many bars through two or three replicas that are killed all the time, then count.

    Lost, doubled and different is meant against one undisturbed run of the engine over the same bars
    with the roles that the group committed.
    """
    bundles = [default_bundle(seed=seed), default_bundle(seed=seed + 1)]
    frame = simulated_bars(symbols, -(-bars // symbols), seed).frame()[:bars]
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as directory,
        LocalKafka() as broker,
    ):
        settings = with_sections(
            Settings(
                bootstrap_servers=broker.bootstrap_servers,
                store=f"{directory}/store",
                database_url=f"sqlite:///{directory}/registry.db",
            ),
            kafka={"delivery": delivery, "session_timeout_ms": 6_000},
            inference={"snapshot_every_s": 2.0},
        )
        create_topics(settings)
        appoint(settings, "champion", bundles[0])
        with Fleet(environment(settings), Path(directory) / "logs") as fleet:
            trouble = _Trouble(fleet, broker, settings, seed)
            trouble.wait_until_all_work()
            trouble.every(kill_every_s, trouble.kill)
            trouble.every(rebalance_every_s, trouble.rebalance)
            times, fed = frame["ts"].to_numpy(), 0

            def name(champion: Bundle) -> None:
                begun_ts = int(times[fed - 1])
                trouble.swap(champion, int(times[times.searchsorted(begun_ts, "right")]))

            for number, share in enumerate(SWAPS, start=1):
                trouble.at(share, partial(name, bundles[number % 2]))
            trouble.at(BROKER_GONE_AT, lambda: trouble.lose_the_broker(broker_gone_s))

            def advance(n: int) -> None:
                nonlocal fed
                fed += n
                trouble.reached(fed / len(frame))
                tell(f"{trouble.kills} kills, {trouble.rebalances} rebalances", fed / len(frame))

            started = time.monotonic()
            limits = Limits(max_lag=MAX_LAG, groups=(settings.inference.group,))
            feed(frame, settings, limits, running=trouble.goes_on, advance=advance)
            tell("working off the rest", 1.0)
            trouble.drain()
            seconds = time.monotonic() - started
            trouble.wait_until_all_work()  # who is only starting knows no order to stop
            statuses = fleet.stop()
        tell("counting, and running undisturbed", 1.0)
        counted = _counted(settings, bundles)
    return {
        "bars": len(frame),
        "kills": trouble.kills,
        "rebalances": trouble.rebalances,
        "swaps": trouble.swaps,
        "given_up_and_restarted": trouble.given_up,
        "broker_gone_s": broker_gone_s,
        **counted,
        "stopped_in_order": set(statuses.values()) == {0},
        "delivery": delivery,
        "symbols": symbols,
        "seconds": round(seconds),
    }


def promises_kept(result: dict[str, Any]) -> bool:
    """Whether a result of `run` is what the delivery mode promises."""
    harms = ["lost", "unexpected", "wrong_role"]
    if result["delivery"] == "exactly_once":
        harms.append("duplicated")
    return (
        not any(result[harm] for harm in harms)
        and result["max_abs_difference"] <= 1e-5
        and result["same_champions_everywhere"]
        and result["expected"] > 0
    )


def _schedules(settings: Settings) -> dict[int, Schedule]:
    """What each partition has committed."""
    offsets = group_offsets(settings, settings.inference.group, BARS)
    return {p: Schedule.from_json(text) for p, (_, text) in offsets.items() if text}


def _counted(settings: Settings, bundles: list[Bundle]) -> dict[str, Any]:
    schedules = _schedules(settings)
    log = read_bars(settings)
    truth = undisturbed(log, schedules, bundles, log.bars.symbols[0])
    changes = [schedule.changes for schedule in schedules.values()]
    return asdict(compare(truth.predictions, read_predictions(settings))) | {
        "same_champions_everywhere": all(each == changes[0] for each in changes)
    }


class _Trouble:
    """Starts replicas, and does to them what happens to replicas: by the clock, or once the feed is so far."""

    def __init__(self, fleet: Fleet, broker: LocalKafka, settings: Settings, seed: int) -> None:
        self.kills = self.rebalances = self.swaps = self.given_up = 0
        self._fleet, self._broker, self._settings = fleet, broker, settings
        self._random = random.Random(seed)
        self._by_clock: list[tuple[float, float, Callable[[], None]]] = []
        self._by_share: list[tuple[float, Callable[[], None]]] = []
        self._looked = 0.0
        self._log_starts: dict[str, int] = {}
        self._there = list(ALWAYS)
        for name in ALWAYS:
            self._start(name)

    def every(self, seconds: float, happens: Callable[[], None]) -> None:
        self._by_clock.append((time.monotonic() + seconds, seconds, happens))

    def at(self, share: float, happens: Callable[[], None]) -> None:
        self._by_share.append((share, happens))

    def reached(self, share: float) -> None:
        due = [each for each in self._by_share if each[0] <= share]
        self._by_share = [each for each in self._by_share if each[0] > share]
        for _, happens in due:
            happens()

    def goes_on(self) -> bool:
        """Let happen what is due, start again what has given up; the feed asks all the time."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return True
        self._looked = now
        for place, (due, seconds, happens) in enumerate(self._by_clock):
            if now >= due:
                happens()
                self._by_clock[place] = (time.monotonic() + seconds, seconds, happens)
        for name in self._fleet.ended():
            self._start(name)
            self.given_up += 1
        return True

    def wait_until_all_work(self) -> None:
        self._patiently(lambda: all(map(self._works, self._there)), "the replicas to work")

    def drain(self) -> None:
        """Wait until everything is committed; in peace, once the rest is small."""
        with closing(GroupLag(self._settings, BARS, [self._settings.inference.group])) as lag:
            self._patiently(lambda: lag() < PEACE_FROM, "the backlog to be worked off")
            self._by_clock.clear()
            self._patiently(lambda: not lag(), "the last bars")

    def kill(self) -> None:
        """Of one that works: to kill what is still starting says nothing."""
        working = [name for name in self._there if self._works(name)]
        if working:
            name = self._random.choice(working)
            self._fleet.kill(name)
            self._start(name)
            self.kills += 1

    def rebalance(self) -> None:
        if NOW_AND_THEN in self._there:
            self._there.remove(NOW_AND_THEN)
            self._fleet.stop(NOW_AND_THEN)
        else:
            self._there.append(NOW_AND_THEN)
            self._start(NOW_AND_THEN)
        self.rebalances += 1

    def swap(self, bundle: Bundle, effective_ts: int) -> None:
        """Name a champion, once every partition has taken up the one before, and let it be heard."""
        self._patiently(self._champions_are_committed, "every partition to take up its champion")
        appoint(self._settings, "champion", bundle, effective_ts)
        self.swaps += 1
        heard_at = time.monotonic() + HEARD_WITHIN_S
        self._patiently(lambda: time.monotonic() >= heard_at, "the replicas to hear of a champion")

    def lose_the_broker(self, seconds: float) -> None:
        self._broker.stop_broker(kill=True)
        time.sleep(seconds)
        self._broker.start_broker()

    def _champions_are_committed(self) -> bool:
        schedules = _schedules(self._settings).values()
        there = [s for s in schedules if len(s.changes["champion"]) > self.swaps]
        return len(there) == self._settings.kafka.partitions

    def _patiently(self, true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            self.goes_on()
            if time.monotonic() > deadline:
                raise NothingHappened(f"waited {PATIENCE_S:.0f} s for {what}")
            time.sleep(LOOK_EVERY_S)

    def _start(self, name: str) -> None:
        log = self._fleet.log_file(name)
        self._log_starts[name] = log.stat().st_size if log.exists() else 0
        self._fleet.start(name, "inference", "--replica", name)

    def _works(self, name: str) -> bool:
        """Whether it has restored what it was assigned."""
        with self._fleet.log_file(name).open("rb") as log:
            log.seek(self._log_starts[name])
            return b"event=restored" in log.read()
