"""The demo: the whole loop on a Kafka of its own and real bars, and a proof of every promise.

The crash of February 2018 in SPY comes first. Where the champion stands it, simulated bars follow,
labelled as such, that no champion of 2017 can stand. Alarm, retraining and verdict are the workers'
own: what the demo does by hand is to start them, to feed bars, and to kill replicas.
"""

import json
import shutil
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from models.bundle import Bundle
from models.pipeline import Recipe, fit_bundle
from models.simulation import Break, Scenario
from models.targets import Target
from models.training import TrainingConfig
from models.watchers import ProgressBar
from schemas.messages import Degradation, Lifecycle
from schemas.topics import ATTENTION, BARS, DEAD_LETTER, DEGRADATION, LIFECYCLE, PREDICTIONS
from workers import bars as sources
from workers import demo_report, proof, report
from workers.bundles import read_bundle, store_bundle
from workers.config import MonitorSettings, Settings
from workers.demo_report import SYMBOL
from workers.errors import BrokerUnavailable
from workers.feed import SILENCE_INTERVALS, Limits, feed
from workers.fleet import Fleet
from workers.kafka import GroupLag, Tail, create_topics, group_offsets, read_topic
from workers.lifecycle import promote
from workers.local_kafka import LocalKafka
from workers.progress import bar_progress
from workers.schedule import Schedule

REPLICAS = ("a", "b")
TARGET = Target(kind="volatility", horizon=30)
NETWORK = {"hidden": 64, "layers": 1, "window": 60}
"""Smaller than the default: trained in a minute, and served beside everything else on two cores."""
BREAK_FIRST = 901
"""Number of the first simulated symbol that is watched; load symbols count from 1."""
MAX_DIFFERENCE = 1e-5
LOOK_EVERY_S = 0.2
DRAIN_WITHIN_S = 120.0
QUIET_S = 3.0


@dataclass(frozen=True)
class Options:
    out: Path = Path("demo")
    simulated_symbols: int = 200
    """Load beside what is watched."""
    load_minutes: int = 30
    """Of each session, from its open, in which the load symbols trade."""
    train: str = "spy:2017"
    real: str = "spy:2018-01..2018-03"
    calendar: str = "spy:2018-01..2018-07"
    """Whose bar times the simulated symbols use, also after the real stretch."""
    break_symbols: int = 8
    break_in_session: int = 3
    simulated_sessions: int = 30
    epochs: int = 3
    sessions_per_minute: float = 18.0
    kill_in_session: int = 21
    down_s: float = 3.0
    sessions_after_swap: int = 4
    pace_while_retraining: float = 0.1
    """Event time goes so much slower between an alarm and its challenger: a retrain takes seconds,
    and at the feed's pace days would pass meanwhile."""
    retraining_s: float = 300.0
    """After which the pace is as before, challenger or not."""
    max_shadow_bars: int = 4_000
    seed: int = 0

    @property
    def break_names(self) -> tuple[str, ...]:
        return tuple(Scenario(symbols=self.break_symbols, first=BREAK_FIRST).names)


@dataclass(frozen=True)
class Stretch:
    """Bars that are fed in one go: in event-time order, real or simulated, with the load beside."""

    name: str
    frame: pd.DataFrame
    simulated: bool


@dataclass(frozen=True)
class Kill:
    replica: str
    ts: int
    """Event time of the newest bar that was fed."""
    from_ms: int
    until_ms: int
    """Wall time from the kill to the restart."""


class Story:
    """What happens, in plain words: printed as it happens, and kept for the report."""

    def __init__(self, console: Console) -> None:
        self.lines: list[str] = []
        self._console = console
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def tell(self, text: str, ts: int | None = None) -> None:
        when = f"{_when(ts)}: " if ts is not None else ""
        self.lines.append(f"{self.seconds:.0f} s · {when}{text}")
        self._console.print(
            f"[dim]{self.seconds:5.0f} s[/]  [bold]{when}[/]{text}", highlight=False
        )


class Director:
    """Looks at the topics and the workers while bars stream; kills replicas and restarts them."""

    def __init__(self, options: Options, settings: Settings, fleet: Fleet, story: Story) -> None:
        self.lifecycle: list[Lifecycle] = []
        self.degradations: list[Degradation] = []
        self.kills: list[Kill] = []
        self.stretches: list[Stretch] = []
        self.ends: list[int] = []
        """Event time of the newest bar that was fed of each stretch."""
        self.now_ts = 0
        """Event time of the newest bar that was fed."""
        self._options, self._fleet, self._story = options, fleet, story
        self._tails = [
            (Tail(settings, LIFECYCLE), self._on_lifecycle),
            (Tail(settings, DEGRADATION), self._on_degradation),
        ]
        self._looked = 0.0
        self._down: tuple[str, int, int] | None = None
        self._alarm_at: float | None = None
        self._ticked, self._clock = time.monotonic(), 0.0

    def clock(self) -> float:
        """Seconds for the feed to pace by: slow ones while a retrain is under way."""
        now = time.monotonic()
        waits = self._alarm_at is not None and now - self._alarm_at < self._options.retraining_s
        self._clock += (now - self._ticked) * (self._options.pace_while_retraining if waits else 1)
        self._ticked = now
        return self._clock

    def begin(self, stretch: Stretch) -> None:
        self.stretches.append(stretch)
        self.ends.append(0)
        self._ts = stretch.frame["ts"].to_numpy()
        self._time = report.TradingTime(self._ts)
        self._fed = 0

    def fed(self, n: int) -> None:
        self._fed += n
        self.now_ts = self.ends[-1] = int(self._ts[self._fed - 1])

    def goes_on(self) -> bool:
        """Look around; False once the stretch has shown what there is to see."""
        if time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            self.look()
        if self._down is not None:
            return True
        if self.promotions:
            return self._sessions_since(self.promotions[-1]) < self._options.sessions_after_swap
        if self.refusals and not self.stretches[-1].simulated:
            return self._sessions_since(self.refusals[-1]) < 1
        return True

    def look(self) -> None:
        self._fleet.check()
        for tail, react in self._tails:
            for message in tail.poll():
                react(message.value() or b"")
        if self._down is not None:
            if _wall_ms() - self._down[2] > 1_000 * self._options.down_s:
                self._restart()
        elif self._is_time_to_kill():
            self._kill(REPLICAS[-1 - len(self.kills)])

    def close(self) -> None:
        for tail, _ in self._tails:
            tail.close()

    def _is_time_to_kill(self) -> bool:
        """Once in quiet times, once while champion and challenger run side by side."""
        if not self.kills:
            return bool(self.now_ts) and self._session() >= self._options.kill_in_session
        if len(self.kills) == 1 and self.challengers:
            return self._sessions_since(self.challengers[0]) > 1
        return False

    def _session(self) -> float:
        return float(self._time(self.now_ts))

    def _sessions_since(self, record: Lifecycle) -> float:
        return self._session() - float(self._time(record.effective_ts))

    @property
    def champions(self) -> list[Lifecycle]:
        return [record for record in self.lifecycle if record.slot == "champion"]

    @property
    def promotions(self) -> list[Lifecycle]:
        """Champions after the first; a rollback is one to the parent."""
        return self.champions[1:]

    @property
    def challengers(self) -> list[Lifecycle]:
        return [r for r in self.lifecycle if r.slot == "challenger" and r.bundle is not None]

    @property
    def _has_challenger(self) -> bool:
        held = [record.bundle for record in self.lifecycle if record.slot == "challenger"]
        return bool(held) and held[-1] is not None

    @property
    def refusals(self) -> list[Lifecycle]:
        """Records that empty the challenger's slot without that bundle becoming champion."""
        promoted = {record.bundle for record in self.promotions}
        refused, held = [], None
        for record in self.lifecycle:
            if record.slot == "challenger":
                if record.bundle is None and held is not None and held not in promoted:
                    refused.append(record)
                held = record.bundle
        return refused

    def _kill(self, replica: str) -> None:
        self._story.tell(
            f"replica {replica} is killed (SIGKILL) in the middle of its work", self.now_ts
        )
        self._down = (replica, self.now_ts, _wall_ms())
        self._fleet.kill(_worker(replica))

    def _restart(self) -> None:
        assert self._down is not None
        replica, ts, from_ms = self._down
        start_replica(self._fleet, replica)
        self.kills.append(Kill(replica, ts, from_ms, _wall_ms()))
        self._down = None
        self._story.tell(f"replica {replica} is started again and restores its state", self.now_ts)

    def _on_degradation(self, value: bytes) -> None:
        event = Degradation.model_validate_json(value)
        if event.inputs is not None:
            return  # said before, without them
        self.degradations.append(event)
        if self._alarm_at is None and not self._has_challenger:
            self._alarm_at = time.monotonic()
        self._story.tell(
            f"alarm: the champion has done worse than the plain reference since "
            f"{_when(event.since_ts)} (statistic {event.statistic:.1f}, alarm above "
            f"{event.threshold:.1f}; a false alarm is due once in {event.arl0:,.0f} bars)",
            event.ts,
        )

    def _on_lifecycle(self, value: bytes) -> None:
        record = Lifecycle.model_validate_json(value)
        self.lifecycle.append(record)
        if record.slot == "champion":
            first = len(self.champions) == 1
            verb = "is the first champion" if first else "becomes champion, between two bars"
            self._story.tell(
                f"{record.bundle} {verb}: {record.reason}", record.effective_ts or None
            )
        elif record.slot == "challenger":
            self._alarm_at = None
            text = (
                f"challenger {record.bundle} runs in shadow: {record.reason}"
                if record.bundle
                else f"the challenger's place is empty again: {record.reason}"
            )
            self._story.tell(text, record.effective_ts)


@dataclass(frozen=True)
class Evidence:
    """What the topics and the undisturbed run say in the end."""

    log: proof.BarsLog
    predictions: pd.DataFrame
    outcomes: pd.DataFrame
    undisturbed: proof.Undisturbed
    comparison: proof.Comparison
    schedules: dict[int, Schedule]
    attention_summaries: int
    dead_letters: int
    bundles: dict[str, Bundle]

    @property
    def champions(self) -> list[str]:
        """The bundles that were champion, in order, on every partition alike."""
        first = next(iter(self.schedules.values()))
        return [change.bundle for change in first.changes["champion"] if change.bundle]

    @property
    def same_champions_everywhere(self) -> bool:
        return all(
            [c.bundle for c in s.changes["champion"]]
            == [c.bundle for c in next(iter(self.schedules.values())).changes["champion"]]
            for s in self.schedules.values()
        )


def run(options: Options, console: Console) -> bool:
    """Run the demo and write its report; whether every promise held."""
    story = Story(console)
    out = options.out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="demo-")))
        bundle, training_s = _train(options, story)
        kafka = stack.enter_context(LocalKafka())
        story.tell(f"Apache Kafka {kafka.version} runs on {kafka.bootstrap_servers}")
        settings = Settings(
            bootstrap_servers=kafka.bootstrap_servers,
            store=str(work / "store"),
            database_url=f"sqlite:///{work / 'registry.db'}",
            monitor=MonitorSettings(
                watch=(SYMBOL, *options.break_names), max_shadow_bars=options.max_shadow_bars
            ),
        )
        create_topics(settings)
        store_bundle(settings, bundle)
        promote(settings, bundle.version, "trained on the calm year 2017", "demo", at_once=True)
        fleet = stack.enter_context(Fleet(environment(settings), out / "logs"))
        for replica in REPLICAS:
            start_replica(fleet, replica)
        fleet.start("monitor", "monitor")
        fleet.start("trainer", "trainer")
        story.tell("two replicas of inference, the monitor and the trainer start")
        director = Director(options, settings, fleet, story)
        stack.callback(director.close)
        load = _load(options)
        _feed(_real(options, load), settings, options, director, story, console)
        if not director.promotions:
            after_ts = director.now_ts
            _feed(_simulated(options, load, after_ts), settings, options, director, story, console)
        story.tell("the feed ends; the workers finish what is left", director.now_ts)
        _drain(settings, director)
        statuses = fleet.stop()
        story.tell("all workers have stopped; now the topics are read and counted")
        evidence = _gather(settings)
    summary = _summary(options, story, director, evidence, kafka.version, training_s)
    promises = _promises(summary, evidence, statuses)
    summary["promises"] = promises
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    sections = demo_report.sections(options, story, director, evidence, summary, promises)
    page = report.write(out, "GPT-Trader Stream: one run of the whole loop", summary, sections)
    _say_the_end(console, summary, promises, page)
    return all(promises.values())


def environment(settings: Settings) -> dict[str, str]:
    """What a child process needs to see the same world."""
    return {
        "KAFKA_BOOTSTRAP_SERVERS": settings.bootstrap_servers,
        "DATABASE_URL": settings.database_url,
        "GPT_TRADER_STORE": settings.store,
        "GPT_TRADER_MONITOR__WATCH": json.dumps(settings.monitor.watch),
        "GPT_TRADER_MONITOR__MAX_SHADOW_BARS": str(settings.monitor.max_shadow_bars),
        "GPT_TRADER_HTTP__HOST": "127.0.0.1",
        "GPT_TRADER_DEVICE": "cpu",
    }


def _train(options: Options, story: Story) -> tuple[Bundle, float]:
    frame = sources.read(options.train)
    story.tell(f"training the first champion on {len(frame):,} calm minutes of {SYMBOL} (2017)")
    started = time.monotonic()
    recipe = Recipe(
        network=NETWORK, training=TrainingConfig(epochs=options.epochs, seed=options.seed)
    )
    with ProgressBar() as bar:
        bundle = fit_bundle(frame, [TARGET], recipe=recipe, watchers=[bar], device="cpu")
    seconds = time.monotonic() - started
    loss, reference = (bundle.metrics[f"{TARGET.name}/{k}"] for k in ("loss", "reference_loss"))
    story.tell(
        f"{bundle.version} is trained in {seconds:.0f} s: on the last fifth of 2017 its QLIKE loss "
        f"is {loss:.3f}, that of the plain reference {reference:.3f}"
    )
    return bundle, seconds


def _load(options: Options) -> pd.DataFrame:
    """Bars of the load symbols over the whole calendar."""
    times = sources.first_minutes(sources.read(options.calendar)["ts"], options.load_minutes)
    if not options.simulated_symbols:
        return sources.simulated(Scenario(), times.iloc[:0], options.seed)
    return sources.simulated(Scenario(symbols=options.simulated_symbols), times, options.seed)


def _real(options: Options, load: pd.DataFrame) -> Stretch:
    real = sources.read(options.real)
    beside = load[load["ts"] <= real["ts"].max()]
    return Stretch(f"real {SYMBOL} minutes", sources.by_time(real, beside), simulated=False)


def _simulated(options: Options, load: pd.DataFrame, after_ts: int) -> Stretch:
    """Symbols whose sessions turn upside down and whose variance grows fourfold, after some normal days.

    The first of them is the first session that opens after `after_ts`.
    """
    times = sources.read(options.calendar)["ts"]
    opens = report.TradingTime(times.to_numpy()).opens
    opens = opens[opens > after_ts][: options.simulated_sessions + 1]
    times = times[(times >= opens[0]) & (times < opens[-1])]
    change = Break(
        at_ts=int(opens[options.break_in_session]), variance_factor=4.0, pattern_power=-1.0
    )
    scenario = Scenario(
        symbols=options.break_symbols, first=BREAK_FIRST, annual_volatility=0.12, breaks=(change,)
    )
    watched = sources.simulated(scenario, times, options.seed)
    beside = load[(load["ts"] >= opens[0]) & (load["ts"] < opens[-1])]
    return Stretch("simulated bars", sources.by_time(watched, beside), simulated=True)


def _feed(
    stretch: Stretch,
    settings: Settings,
    options: Options,
    director: Director,
    story: Story,
    console: Console,
) -> None:
    if stretch.simulated:
        story.tell(
            "real bars gave no reason to swap. From here on SIMULATED bars: "
            f"{options.break_symbols} symbols, whose sessions turn upside down after "
            f"{options.break_in_session} days"
        )
    else:
        story.tell(
            f"{stretch.name} stream, with {options.simulated_symbols} simulated symbols as load"
        )
    director.begin(stretch)
    session_s = 391 * 60 + SILENCE_INTERVALS * 60
    sessions = len(report.TradingTime(stretch.frame["ts"].to_numpy()))
    limits = Limits(
        speed=session_s * options.sessions_per_minute / 60, max_lag=len(stretch.frame) // sessions
    )
    with bar_progress(console) as progress:
        task = progress.add_task("bars", total=len(stretch.frame))

        def advance(n: int) -> None:
            director.fed(n)
            progress.update(task, advance=n, description=_when(director.now_ts))

        feed(
            stretch.frame,
            settings,
            limits,
            running=director.goes_on,
            advance=advance,
            clock=director.clock,
        )


def _drain(settings: Settings, director: Director) -> None:
    """Wait until the workers have nothing left to do."""
    with (
        closing(GroupLag(settings, BARS, ["inference", "monitor"])) as bars,
        closing(GroupLag(settings, PREDICTIONS, ["monitor"])) as predictions,
    ):
        last, quiet_since = (-1, -1), time.monotonic()
        deadline = quiet_since + DRAIN_WITHIN_S
        while time.monotonic() < deadline:
            director.look()
            now = bars(), predictions()
            if now != last:
                last, quiet_since = now, time.monotonic()
            # Transaction markers count as messages that nobody reads: the rest may stand still above 0.
            if now[0] == 0 and time.monotonic() - quiet_since > QUIET_S:
                return
            time.sleep(0.2)
    raise BrokerUnavailable(f"the workers were not done after {DRAIN_WITHIN_S:.0f} s: lag {last}")


def _gather(settings: Settings) -> Evidence:
    log = proof.read_bars(settings)
    predictions = proof.read_predictions(settings)
    offsets = group_offsets(settings, settings.inference.group, BARS)
    schedules = {
        p: Schedule.from_json(metadata) for p, (_, metadata) in offsets.items() if metadata
    }
    versions = list(dict.fromkeys(b for s in schedules.values() for b in _in_order(s)))
    bundles = {version: read_bundle(settings, version) for version in versions}
    undisturbed = proof.undisturbed(log, schedules, list(bundles.values()), SYMBOL)
    return Evidence(
        log=log,
        predictions=predictions,
        outcomes=proof.read_outcomes(settings),
        undisturbed=undisturbed,
        comparison=proof.compare(undisturbed.predictions, predictions),
        schedules=schedules,
        attention_summaries=sum(1 for _ in read_topic(settings, ATTENTION)),
        dead_letters=sum(1 for _ in read_topic(settings, DEAD_LETTER)),
        bundles=bundles,
    )


def _in_order(schedule: Schedule) -> list[str]:
    changes = sorted((c for cs in schedule.changes.values() for c in cs), key=lambda c: c.from_ts)
    return [change.bundle for change in changes if change.bundle]


def _summary(
    options: Options,
    story: Story,
    director: Director,
    evidence: Evidence,
    kafka_version: str,
    training_s: float,
) -> dict[str, Any]:
    compared = evidence.comparison
    return {
        "kafka_version": kafka_version,
        "bars_in": len(evidence.log.bars),
        "simulated_symbols": options.simulated_symbols,
        "stretches": [
            _span(stretch, end)
            for stretch, end in zip(director.stretches, director.ends, strict=True)
        ],
        "predictions": compared.published,
        "distinct_prediction_ids": compared.distinct,
        "expected_predictions": compared.expected,
        "lost": compared.lost,
        "duplicated": compared.duplicated,
        "unexpected": compared.unexpected,
        "in_the_wrong_role": compared.wrong_role,
        "max_abs_difference_from_undisturbed": compared.max_abs_difference,
        "attention_summaries": evidence.attention_summaries,
        "outcomes": len(evidence.outcomes),
        "dead_letters": evidence.dead_letters,
        "degradation_events": len(director.degradations),
        "retrains": len(director.challengers),
        "promotions": len(director.promotions),
        "refusals": len(director.refusals),
        "swaps": len(evidence.champions) - 1,
        "champions": evidence.champions,
        "replicas_killed": len(director.kills),
        "training_seconds": round(training_s, 1),
        "seconds": round(story.seconds, 1),
    }


def _span(stretch: Stretch, until_ts: int) -> str:
    times = stretch.frame["ts"][stretch.frame["ts"] <= until_ts]
    return f"{stretch.name}, {_when(int(times.iloc[0]))} to {_when(int(times.iloc[-1]))}"


def _promises(
    summary: dict[str, Any], evidence: Evidence, statuses: dict[str, int]
) -> dict[str, bool]:
    return {
        "nothing lost": summary["lost"] == 0,
        "nothing predicted twice": summary["duplicated"] == 0,
        "nothing predicted that an undisturbed run would not": summary["unexpected"] == 0
        and summary["in_the_wrong_role"] == 0,
        "same values as an undisturbed run": summary["predictions"] > 0
        and summary["max_abs_difference_from_undisturbed"] <= MAX_DIFFERENCE,
        "an attention summary for each forecast": summary["attention_summaries"]
        == summary["distinct_prediction_ids"],
        "no bar refused": summary["dead_letters"] == 0,
        "a replica killed and back": summary["replicas_killed"] >= 1,
        "an alarm, and a retrain that answers it": summary["degradation_events"] >= 1
        and summary["retrains"] >= 1,
        "a swap under load": summary["swaps"] >= 1,
        "the same champions on every partition": evidence.same_champions_everywhere,
        "every worker stopped in order": all(status == 0 for status in statuses.values()),
    }


def _say_the_end(
    console: Console, summary: dict[str, Any], promises: dict[str, bool], page: Path
) -> None:
    for promise, held in promises.items():
        console.print(f"  {'[green]kept[/]  ' if held else '[bold red]broken[/]'}  {promise}")
    console.print(
        f"{summary['bars_in']:,} bars, {summary['predictions']:,} predictions, "
        f"{summary['lost']} lost, {summary['duplicated']} twice, largest difference from an "
        f"undisturbed run {summary['max_abs_difference_from_undisturbed']:.1e}; "
        f"{summary['seconds']:.0f} s in all"
    )
    console.print(f"report: {page}")


def _worker(replica: str) -> str:
    return f"inference-{replica}"


def start_replica(fleet: Fleet, replica: str) -> None:
    fleet.start(_worker(replica), "inference", "--replica", replica)


def _when(ts: int) -> str:
    local = pd.Timestamp(ts, unit="ms", tz="UTC").tz_convert(report.NEW_YORK)
    return local.strftime("%-d %b %Y %H:%M")


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
