"""The monitor: predictions and bars in; outcomes, alarms and verdicts on challengers out.

Beside an alarm, and once a day, it measures in another thread how far the inputs have drifted; an
alarm that is said with that is said a second time, and no alarm comes of it.

One process judges for all: its statistics pool the partitions that it has. A second replica would
judge its own share of the symbols, and publish its own verdicts.
"""

import gc
import hashlib
import json
import logging
import time
import zlib
from base64 import b85decode, b85encode
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from models.bundle import Bundle, BundleRejected
from models.comparison import CAUTION
from models.drift import Calibration
from models.running_loss import pair_bars, runs_up
from models.targets import Target
from schemas.codecs import decode_bars, decode_predictions, encode, encode_outcomes
from schemas.messages import (
    ARM_SLOT_OF,
    ARM_SLOTS,
    Degradation,
    InputDrift,
    Lifecycle,
    Performance,
    Slot,
)
from schemas.tables import DegradationRow, WindowRow
from schemas.topics import BARS, DEGRADATION, LIFECYCLE, OUTCOMES, PERFORMANCE, PREDICTIONS
from workers import lifecycle
from workers.alarm_picture import picture_uri, store_picture
from workers.bundles import bundle_uri, open_bundle, read_bundle
from workers.config import Settings
from workers.errors import TransactionAborted
from workers.idleness import Idleness
from workers.inputs import RecentBars, drift_of
from workers.joining import Join, Outcomes, under
from workers.kafka import (
    DeadLetters,
    Message,
    Tail,
    check_topics,
    committed,
    make_consumer,
    make_publisher,
    poll_batch,
    read_topic,
    seek,
)
from workers.logs import event
from workers.scoring import Scorer
from workers.service import Service
from workers.snapshots import Snapshots
from workers.store import Outbox, Registry, wall_ms
from workers.verdicts import Decision, Judge, level_of
from workers.watch import Alarm
from workers.watchdog import Watchdog
from workers.windows import Windows

log = logging.getLogger(__name__)

TOPICS = (PREDICTIONS, BARS)
ACTOR = "monitor"
DAY_MS = 24 * 3_600_000
LOOKED_AT_EVERY_S = 1.0
"""How often lag and stalled partitions are brought to /metrics and /healthz."""

Place = tuple[str, int]


def run(settings: Settings) -> None:
    """Serve until asked to stop. Raises what `workers.errors` says a worker exits with."""
    with Service("monitor", settings.http) as service:
        check_topics(settings)
        worker = Monitor(settings, service)
        try:
            if worker.wait_for_champion():
                gc.freeze()  # to walk through all that is loaded took a quarter of the time
                worker.serve()
        finally:
            worker.close()


@dataclass
class _Progress:
    position: int
    committed: int
    """What is before it was joined and published already; read again, it only rebuilds state."""


class Monitor:
    def __init__(
        self, settings: Settings, service: Service, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings, self._service, self._clock = settings, service, clock
        self._metrics = service.metrics
        self._tail = Tail(settings, LIFECYCLE)
        self._records: dict[Slot, Lifecycle] = {}
        self._champions: list[Lifecycle] = []
        self._bundles: dict[str, Bundle | None] = {}
        self._outbox = Outbox(Registry(settings.database_url), service.metrics)
        self._outbox.put("create", Registry.create)
        self._put_back()
        self._snapshots = Snapshots(
            f"{settings.store}/snapshots", settings.monitor.group, metrics=service.metrics
        )
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="aside")
        self._writing: Future[bool] | None = None
        self._snapshot_at: dict[int, float] = {}
        self._progress: dict[Place, _Progress] = {}
        self._windows = Windows()
        self._idleness = Idleness(settings.monitor.idle_s)
        self._newest_ts = 0
        self._recent = RecentBars(settings.monitor.watch)
        self._measuring: deque[tuple[str, Degradation | None, Future[InputDrift | None]]] = deque()
        """Bundle, and the alarm that it is for."""
        self._measured_day = -1
        self._look_at = 0.0
        self._said: list[Degradation] = []
        self._settled = True
        """State is that of the committed offsets: not so while a batch is half done."""

    def wait_for_champion(self) -> bool:
        """Block until there is a champion whose losses can be judged, or until asked to stop (False)."""
        event(log, "waiting_for_champion", topic=LIFECYCLE)
        while self._service.running:
            self._service.progress()
            self._read_lifecycle()
            champion = self._records.get("champion")
            known = self._tail.caught_up and champion and champion.bundle
            if known and champion and (bundle := self._bundle(known, champion.uri)):
                self._open(bundle)
                return True
            self._service.wait(0.05)
        return False

    def serve(self) -> None:
        while self._service.running:
            try:
                self.cycle()
            except TransactionAborted as error:
                self._metrics.transactions_aborted.inc()
                event(log, "transaction_aborted", reason=error)
                self._restore(self._partitions, rewind=True)
                self._settled = True
            self._service.progress()

    def cycle(self) -> None:
        """Poll, join, score and publish outcomes, judge, publish verdicts, commit."""
        self._follow_lifecycle()
        self._look_if_due()
        messages = poll_batch(
            self._consumer, self._settings.monitor.max_batch, self._settings.monitor.poll_ms
        )
        started = self._clock()
        self._settled = False
        for outcomes in self._joined(messages):
            self._take(outcomes)
        if not self._is_replaying:
            self._take_measured()
        if self._judge_what_is_complete() or self._moved or self._said:
            self._commit()
        self._measure_if_due()
        if messages:
            self._metrics.cycle_seconds.observe(self._clock() - started)
            self._show()
        self._settled = True
        self._outbox.flush()
        self._snapshot_if_due()

    def close(self) -> None:
        """Snapshot what is held, then leave the group."""
        if hasattr(self, "_consumer"):
            for partition in self._partitions if self._settled else ():
                self._snapshot(partition)
            self._publisher.close()
            self._consumer.close()
        self._aside.shutdown()
        self._tail.close()
        if waiting := self._outbox.flush():
            event(log, "registry_writes_lost", n=waiting)

    def _open(self, champion: Bundle) -> None:
        config = champion.config
        self._interval_ms = config.features.interval_ms
        self._target = _decisive(config.targets, self._settings.monitor.target)
        running = self._target if runs_up(self._target) else None
        self._join = Join(config.features, config.targets, running)
        self._scorer = Scorer(self._join, self._target, self._bundle)
        self._judge = Judge(
            self._settings.monitor,
            self._interval_ms,
            self._join.symbols,
            self._join.holders,
            pair_bars=pair_bars(self._target),
        )
        self._consumer = make_consumer(
            self._settings,
            self._settings.monitor.group,
            TOPICS,
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            watch_ends=True,
        )
        self._watchdog = Watchdog(self._consumer, self._settings, self._service, self._clock)
        self._publisher = make_publisher(self._settings, "monitor", self._consumer)
        self._dead_letters = DeadLetters(self._publisher, self._settings.dead_letter, self._metrics)

    # ---- outcomes ----

    def _joined(self, messages: Sequence[Message]) -> Iterator[Outcomes]:
        """What predictions, then bars, of the batch bring to an end; positions move past them."""
        moved: dict[Place, int] = {}
        for topic in TOPICS:
            read = [message for message in messages if message.topic() == topic]
            if not read:
                continue
            partitions = np.array([message.partition() for message in read], np.int64)
            offsets = np.array([message.offset() for message in read], np.int64)
            live = np.empty(len(read), np.bool_)
            for partition in np.unique(partitions).tolist():
                here = partitions == partition
                live[here] = offsets[here] >= self._progress[topic, partition].committed
                moved[topic, partition] = int(offsets[here][-1]) + 1
            self._metrics.messages_consumed.labels(topic).inc(len(read))
            take = self._take_predictions if topic == PREDICTIONS else self._take_bars
            yield take(read, partitions, live)
        for place, position in moved.items():
            self._progress[place].position = position
        for place, end in self._consumer.ends.items():  # past control records too
            self._progress[place].position = max(self._progress[place].position, end)

    def _take_predictions(
        self, messages: Sequence[Message], partitions: NDArray[np.int64], live: NDArray[np.bool_]
    ) -> Outcomes:
        predictions, places, rejected = decode_predictions([m.value() for m in messages])
        for rejection in rejected:
            if live[rejection.index]:
                self._dead_letters.send(messages[rejection.index], rejection.reason)
        self._dead_letters.passed(int(np.count_nonzero(live[places])))
        return self._join.take_predictions(predictions, partitions[places], live[places])

    def _take_bars(
        self, messages: Sequence[Message], partitions: NDArray[np.int64], live: NDArray[np.bool_]
    ) -> Outcomes:
        """Bars that cannot be read are left to inference, which sets them aside."""
        bars, places, _ = decode_bars([m.value() for m in messages])
        self._newest_ts = max(self._newest_ts, int(bars.ts.max(initial=0)))
        self._recent.update(bars, partitions[places])
        return self._join.take_bars(bars, partitions[places], live[places])

    def _take(self, outcomes: Outcomes) -> None:
        """Score outcomes, publish those that are news, and hand to the judge what it goes by."""
        of_steps = outcomes["target"] == len(self._join.targets)
        if self._join.running is not None:
            self._judge.add(self._scorer.running(outcomes[of_steps]))
        outcomes = outcomes[~of_steps]
        losses, reference_losses = self._scorer.losses(outcomes)
        scored = np.isfinite(losses) & np.isfinite(reference_losses)
        if n := int(np.count_nonzero(~scored)):
            self._join.dropped["unscored"] += n
        outcomes, losses = outcomes[scored], losses[scored]
        reference_losses = reference_losses[scored]
        if self._join.running is None:
            self._judge.add(self._scorer.matured(outcomes, losses, reference_losses))
        news = outcomes["live"]
        if news.any():
            self._publish_outcomes(outcomes[news], losses[news], reference_losses[news])

    def _publish_outcomes(
        self, outcomes: Outcomes, losses: NDArray[np.float64], reference_losses: NDArray[np.float64]
    ) -> None:
        symbols, holders = self._join.symbols, self._join.holders
        names = [target.name for target in self._join.targets]
        of_series = (outcomes["slot"] * len(holders) + outcomes["holder"]) * len(names)
        distinct, which = np.unique(of_series + outcomes["target"], return_inverse=True)
        series, keys, partitions = [], [], []
        for code in distinct.tolist():
            code, target = divmod(code, len(names))
            slot, holder = divmod(code, len(holders))
            partition, symbol = symbols[slot]
            bundle, role, arm = holders[holder]
            series.append((symbol, names[target], bundle, role, arm))
            keys.append(symbol.encode())
            partitions.append(partition)
        values = encode_outcomes(
            series,
            which,
            outcomes["ts"],
            outcomes["matured_ts"],
            outcomes["value"],
            outcomes["label"],
            losses,
            reference_losses,
        )
        rows = which.tolist()
        self._publisher.produce_all(
            OUTCOMES, map(keys.__getitem__, rows), values, map(partitions.__getitem__, rows)
        )
        self._metrics.messages_produced.labels(OUTCOMES).inc(len(outcomes))
        for holder, target, at in self._scorer.groups(outcomes):
            (bundle, role, arm), name = holders[holder], names[target]
            self._metrics.outcomes.labels(name, role).inc(len(at))
            place = ARM_SLOT_OF.get(arm, role)
            self._windows.add(
                bundle, place, name, outcomes["ts"][at], losses[at], reference_losses[at]
            )

    # ---- verdicts ----

    def _judge_what_is_complete(self) -> bool:
        """Whether there was a verdict; without a message there is one when a partition becomes idle."""
        if self._is_replaying:
            return False  # it must not settle what other partitions have yet to bring back
        whole = {p for p in self._partitions if self._is_at_end((PREDICTIONS, p))}
        verdicts = list(self._judge.verdicts(self._idle(), whole))
        for verdict in verdicts:
            if isinstance(verdict, Alarm):
                self._raise_alarm(verdict)
            else:
                self._decide(verdict)
        return bool(verdicts)

    @property
    def _is_replaying(self) -> bool:
        return any(p.position < p.committed for p in self._progress.values())

    def _idle(self) -> Collection[int]:
        at_end = [p for p in self._partitions if all(self._is_at_end((t, p)) for t in TOPICS)]
        return self._idleness.update(at_end, self._clock())

    def _is_at_end(self, place: Place) -> bool:
        return self._consumer.ends.get(place, -1) >= self._progress[place].position

    def _raise_alarm(self, alarm: Alarm) -> None:
        target = self._target.name
        name = f"{alarm.bundle}/{target}/{alarm.ts}"
        alarm_id = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        degradation = Degradation(
            id=alarm_id,
            bundle=alarm.bundle,
            target=target,
            detector=alarm.detector,
            statistic=alarm.statistic,
            threshold=alarm.threshold,
            arl0=alarm.arl0_bars,
            since_ts=alarm.since_ts,
            ts=alarm.ts,
            symbols=list(alarm.symbols),
            excess_loss=alarm.excess_loss,
            excess_by_symbol=alarm.symbols,
            bars=alarm.bars,
            repeats=alarm.repeats,
            action="retrain" if alarm.roll_back_to is None else "roll_back",
            picture=picture_uri(self._settings, alarm_id),
            issued_at=wall_ms(),
        )
        self._aside.submit(store_picture, self._settings, degradation, self._judge.trace)
        self._say(degradation)
        self._measure(alarm.bundle, degradation)
        self._metrics.degradations.labels(target).inc()
        event(log, "degradation", **degradation.model_dump(exclude={"schema_version"}))
        if alarm.roll_back_to is not None and (parent := self._bundle(alarm.roll_back_to)):
            self._publish(
                lifecycle.fill(
                    "champion",
                    parent,
                    bundle_uri(self._settings, parent.version),
                    effective_ts=self._soon(),
                    reason="worse than the reference while on probation",
                    actor=ACTOR,
                    parent=parent.provenance.parent,
                    evidence={"statistic": alarm.statistic, "threshold": alarm.threshold},
                )
            )
            self._metrics.decisions.labels("rolled_back").inc()

    def _say(self, degradation: Degradation) -> None:
        self._publisher.produce(DEGRADATION, degradation.bundle.encode(), encode(degradation))
        self._said.append(degradation)

    def _decide(self, decision: Decision) -> None:
        slot, settings = decision.slot, self._settings.monitor
        evidence = {
            name: value for name, value in decision.evidence._asdict().items() if name != "verdict"
        } | {"alpha": settings.alpha, "against": decision.champion}
        is_arm = slot in ARM_SLOTS
        if not is_arm:
            evidence["level"] = level_of(settings, slot)
        refusal: str | None = f"{'worse than' if is_arm else 'no better than'} the champion"
        if decision.evidence.verdict == "promote":
            refusal = self._reason_against(decision.rival)
        promoted = refusal is None
        challenger = self._bundle(decision.rival)
        emptied: list[Slot] = [slot]
        if promoted and challenger is not None:
            emptied = lifecycle.slots_of(self._records.values(), challenger.version)
            self._publish(
                lifecycle.fill(
                    "champion",
                    challenger,
                    bundle_uri(self._settings, challenger.version),
                    effective_ts=self._soon(),
                    reason="better than the champion on the same bars",
                    actor=ACTOR,
                    parent=decision.champion,
                    # A parent in alarm is no refuge: it is known to be bad, and this one to be better.
                    evidence=evidence
                    | {
                        "probation_bars": 0
                        if self._judge.alarm_is_open
                        else settings.probation_bars
                    },
                )
            )
        for each in emptied:
            self._publish(
                lifecycle.clear(
                    each,
                    effective_ts=self._soon(),
                    reason=refusal or "promoted",
                    actor=ACTOR,
                    evidence=evidence | {"challenger": decision.rival},
                )
            )
        self._metrics.decisions.labels("promoted" if promoted else "refused").inc()

    def _reason_against(self, challenger: str) -> str | None:
        """Why a challenger that has won is not promoted all the same."""
        if challenger in lifecycle.rolled_back(self._champions):
            return "rolled back before: only a person may promote it"
        try:
            open_bundle(self._settings, challenger)
        except (BundleRejected, OSError) as error:
            return f"fails its checks: {error}"
        return None

    def _publish(self, record: Lifecycle) -> None:
        self._publisher.produce(LIFECYCLE, record.slot.encode(), encode(record))
        event(
            log,
            "lifecycle",
            slot=record.slot,
            bundle=record.bundle,
            effective_ts=record.effective_ts,
            reason=record.reason,
        )

    def _soon(self) -> int:
        return self._newest_ts + self._settings.trainer.lead_bars * self._interval_ms

    # ---- inputs ----

    def _measure_if_due(self) -> None:
        """Once a day of bar time, of the champion; in a hurry, as often as it can be."""
        day = self._newest_ts // DAY_MS
        if day <= self._measured_day or self._measuring or not self._recent.is_enough:
            return
        champion = self._records.get("champion")
        if champion is not None and champion.bundle is not None:
            self._measured_day = day
            self._measure(champion.bundle)

    def _measure(self, version: str, alarm: Degradation | None = None) -> None:
        """Aside; what comes of it is looked at in a later cycle."""
        if (bundle := self._bundle(version)) is not None:
            drift = self._aside.submit(drift_of, bundle, self._recent.get())
            self._measuring.append((version, alarm, drift))

    def _take_measured(self) -> None:
        while self._measuring and self._measuring[0][2].done():
            version, alarm, measured = self._measuring.popleft()
            if (drift := measured.result()) is None:
                continue
            self._metrics.input_psi.labels(version).set(next(iter(drift.psi.values())))
            self._metrics.input_ks.labels(version).set(next(iter(drift.ks.values())))
            if drift.embedding is not None:
                self._metrics.input_embedding_distance.labels(version).set(drift.embedding)
            event(log, "input_drift", bundle=version, **drift.model_dump())
            if alarm is not None:
                self._say(alarm.model_copy(update={"inputs": drift}))

    # ---- lifecycle ----

    def _read_lifecycle(self) -> list[Lifecycle]:
        """New records, each put into the audit: nobody can change a slot unseen."""
        read = []
        for message in self._tail.poll():
            try:
                record = Lifecycle.model_validate_json(message.value() or b"")
            except ValidationError as error:
                event(log, "lifecycle_record_invalid", reason=error)
                continue
            before = self._records.get(record.slot)
            self._records[record.slot] = record
            if record.slot == "champion":
                self._champions.append(record)
            read.append(record)
            held = before.bundle if before else None
            self._outbox.put("audit", partial(lifecycle.audit, record=record, from_bundle=held))
        return read

    def _follow_lifecycle(self) -> None:
        for record in self._read_lifecycle():
            self._judge.follow(record, self._calibration(record))

    def _calibration(self, record: Lifecycle) -> Calibration | None:
        bundle = self._bundle(record.bundle, record.uri) if record.bundle else None
        if bundle is None or self._target not in bundle.config.targets:
            return None
        return bundle.config.calibrations[bundle.config.targets.index(self._target)]

    def _bundle(self, version: str, uri: str | None = None) -> Bundle | None:
        """A bundle of the store, read once; None where it is refused or gone."""
        if version not in self._bundles:
            try:
                self._bundles[version] = read_bundle(self._settings, version, uri)
            except (BundleRejected, OSError) as error:
                self._bundles[version] = None
                event(log, "bundle_unreadable", bundle=version, reason=error)
        return self._bundles[version]

    # ---- partitions ----

    @property
    def _partitions(self) -> list[int]:
        return sorted({partition for _, partition in self._progress})

    @property
    def _moved(self) -> list[Place]:
        return [place for place, p in self._progress.items() if p.position > p.committed]

    def _commit(self) -> None:
        closed = list(self._windows.close())
        for window in closed:
            message = Performance(
                **{
                    column.key: getattr(window, column.key)
                    for column in WindowRow.__table__.columns
                }
            )
            key = f"{window.bundle}/{window.role}/{window.target}/{window.from_ts}"
            self._publisher.produce(PERFORMANCE, key.encode(), encode(message))
        self._sequence += 1
        state = _packed(
            {
                "sequence": self._sequence,
                "judge": self._judge.to_json(),
                "windows": self._windows.export(),
            }
        )
        started = self._clock()
        places = self._moved or list(self._progress)[:1]  # the state needs one to be committed with
        self._publisher.commit({place: (self._progress[place].position, state) for place in places})
        self._publisher.flush()
        for place in places:
            self._progress[place].committed = self._progress[place].position
        self._metrics.commit_seconds.observe(self._clock() - started)
        self._register(self._said, closed)
        self._said.clear()

    def _register(self, alarms: Sequence[Degradation], windows: Sequence[WindowRow]) -> None:
        """What was committed goes into the registry too."""
        for degradation in alarms:
            columns = set(DegradationRow.__mapper__.columns.keys())
            row = DegradationRow(**degradation.model_dump(include=columns))
            self._outbox.put("degradation", partial(Registry.add_degradation, degradation=row))
        if windows:
            self._outbox.put("window", partial(Registry.add_windows, windows=windows))

    def _put_back(self) -> None:
        """Register what earlier lives published: one of them may have died before it did."""
        alarms, windows = [], []
        for message in read_topic(self._settings, DEGRADATION):
            with suppress(ValidationError):
                alarms.append(Degradation.model_validate_json(message.value() or b""))
        for message in read_topic(self._settings, PERFORMANCE):
            found = Performance.model_validate_json(message.value() or b"")
            windows.append(WindowRow(**found.model_dump(exclude={"schema_version"})))
        self._register(alarms, windows)

    def _on_assign(self, partitions: Sequence[int]) -> dict[Place, int]:
        check_topics(self._settings)  # a partition that was added moves keys: stop with a word
        self._metrics.rebalances.labels("assigned").inc()
        for partition in set(self._partitions) - set(partitions):
            self._drop(partition)
        self._progress = {}
        self._restore(partitions, rewind=False)
        return {place: progress.position for place, progress in self._progress.items()}

    def _on_revoke(self, partitions: Sequence[int], lost: bool) -> None:
        self._metrics.rebalances.labels("lost" if lost else "revoked").inc()

    def _restore(self, partitions: Sequence[int], *, rewind: bool) -> None:
        """State as of the committed offsets: the judge's comes with them, the join's is replayed."""
        started = self._clock()
        self._said.clear()
        self._measuring.clear()  # an alarm whose transaction was aborted was never raised
        offsets = {topic: committed(self._consumer, topic, partitions) for topic in TOPICS}
        states = [
            _unpacked(metadata)
            for found in offsets.values()
            for _, metadata in found.values()
            if metadata
        ]
        newest = max(states, key=lambda s: int(s["sequence"]), default=None)
        self._sequence = newest["sequence"] if newest else 0
        self._windows.load(newest["windows"] if newest else [])
        self._judge.load(newest["judge"] if newest else "", partitions)
        for record in self._records.values():
            self._judge.follow(record, self._calibration(record))
        for partition in partitions:
            self._restore_partition(
                partition, {topic: offsets[topic][partition][0] for topic in TOPICS}
            )
            if rewind:
                for topic in TOPICS:
                    position = self._progress[topic, partition].position
                    seek(self._consumer, topic, partition, position)
            self._service.progress()
        self._metrics.restore_seconds.observe(self._clock() - started)

    def _restore_partition(self, partition: int, offsets: dict[str, int]) -> None:
        snapshot = self._snapshots.load(partition, at_or_below=offsets)
        self._drop(partition)
        if snapshot is not None and self._join.fits(snapshot.meta):
            self._join.load(partition, snapshot.arrays, snapshot.meta)
            self._scorer.load(partition, under("scorer/", snapshot.arrays), snapshot.meta["scorer"])
            self._judge.load_partition(
                partition,
                under("judge/", snapshot.arrays),
                snapshot.meta["judge"],
                partial(self._join.slot_of, partition),
                self._join.holder_of,
            )
            self._recent.load(partition, under("recent/", snapshot.arrays), snapshot.meta["recent"])
            positions = snapshot.offsets
        else:
            positions = dict.fromkeys(TOPICS, 0)
        for topic in TOPICS:
            self._progress[topic, partition] = _Progress(positions[topic], offsets[topic])
        every = self._settings.monitor.snapshot_every_s
        self._snapshot_at[partition] = self._clock() + every * (1 + partition % 7 / 7)
        event(log, "restored", partition=partition, replay_from=positions, live_from=offsets)

    def _drop(self, partition: int) -> None:
        self._scorer.drop(partition)
        self._join.drop(partition)
        self._recent.drop(partition)

    def _snapshot_if_due(self) -> None:
        if self._writing is not None and not self._writing.done():
            return
        now = self._clock()
        for partition in self._partitions:
            if now >= self._snapshot_at[partition]:
                self._snapshot_at[partition] = now + self._settings.monitor.snapshot_every_s
                self._snapshot(partition)
                return

    def _snapshot(self, partition: int) -> None:
        """Between two cycles everything up to the positions is committed."""
        here = {topic: self._progress[topic, partition] for topic in TOPICS}
        if all(progress.position >= progress.committed for progress in here.values()):
            arrays, meta = self._join.export(partition)
            parts = {
                "scorer": self._scorer.export(partition),
                "judge": self._judge.export(partition),
                "recent": self._recent.export(partition),
            }
            self._writing = self._aside.submit(
                self._snapshots.save,
                partition,
                {topic: progress.position for topic, progress in here.items()},
                arrays
                | {f"{part}/{n}": a for part, (own, _) in parts.items() for n, a in own.items()},
                meta | {part: own for part, (_, own) in parts.items()},
            )

    # ---- numbers ----

    def _look_if_due(self) -> None:
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + LOOKED_AT_EVERY_S
            self._watchdog.look({place: at.position for place, at in self._progress.items()})

    def _show(self) -> None:
        target = self._target.name
        if (standing := self._judge.statistic) is not None:
            bundle, statistic, threshold = standing
            self._metrics.cusum.labels(bundle, target).set(statistic)
            self._metrics.cusum_threshold.labels(bundle, target).set(threshold)
        for bundle, level, evidence in self._judge.evidence.values():
            share = min(evidence.e_better * level / CAUTION, 1.0)
            self._metrics.challenger_evidence.labels(bundle, target).set(share)
        self._service.publish(
            dropped=dict(self._join.dropped + self._judge.dropped),
            newest_ts=self._newest_ts,
            alarm_is_open=self._judge.alarm_is_open,
        )


def _decisive(targets: Sequence[Target], wanted: str) -> Target:
    """The first target of that kind or name; the first of all where none is."""
    return next((t for t in targets if wanted in (t.kind, t.name)), targets[0])


def _packed(state: Mapping[str, Any]) -> str:
    """Compressed, to stay below the 4,096 bytes that a broker allows with many rivals and windows."""
    text = json.dumps(state, separators=(",", ":"))
    return b85encode(zlib.compress(text.encode(), 9)).decode()


def _unpacked(text: str) -> dict[str, Any]:
    return dict(json.loads(zlib.decompress(b85decode(text))))
