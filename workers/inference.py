"""The inference worker: bars in, predictions and attention summaries out, one transaction a batch.

Two threads: one polls, decodes and runs the engine; the other encodes what the engine said, produces
and commits it, while the first is at the next batch already. All state belongs to the first, which
does a small batch alone.
"""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.bundle import BundleRejected
from models.features import DUPLICATE, LATE, RESET
from models.runtimes import Runtime, set_threads
from schemas.codecs import (
    BarColumns,
    Rejected,
    decode_bars,
    encode_attention,
    encode_predictions,
)
from schemas.topics import ATTENTION, BARS, LIFECYCLE, PREDICTIONS
from workers.bundles import open_bundle
from workers.config import Settings
from workers.engine import Engine, Forecast, Processed
from workers.errors import TransactionAborted
from workers.kafka import (
    Backlog,
    DeadLetters,
    Message,
    Tail,
    check_topics,
    committed,
    make_consumer,
    make_publisher,
    poll_batch,
    seek,
)
from workers.live_bundle import LiveBundles
from workers.logs import event
from workers.schedule import Schedule
from workers.service import Service
from workers.snapshots import Snapshot, Snapshots
from workers.watchdog import Watchdog

log = logging.getLogger(__name__)

NO_BARS = BarColumns([], np.zeros(0, np.int64), np.zeros((0, 5)))
SHOWN_EVERY_S = 1.0
"""How often lag and positions are brought to /metrics and /healthz."""
OVERLAPPED_FROM = 0.25
"""Share of a full batch from which it is published while the next one runs. With less, bars that arrive
meanwhile do better to go together, and waking another thread takes longer than what it would do."""
AWAITED_S = 10.0
"""How long the first bars of a change wait for its bundle; without it they go to the one before."""
ROOM = 1.1
"""Symbols of a partition over those of the one restored before it; what no symbol uses takes no memory."""
READ_AHEAD = 8
"""Batches held in memory: enough of a backlog that each batch holds bars of all partitions."""
RETIRED_AFTER_BARS = 512
"""A bundle stays loaded for so many bar times after it lost its role: some symbol may lag."""


def run(settings: Settings) -> None:
    """Serve until asked to stop. Raises what `workers.errors` says a worker exits with."""
    set_threads(settings.inference.torch_threads)
    with Service("inference", settings.http) as service:
        check_topics(settings)
        worker = Inference(settings, service)
        try:
            if worker.wait_for_champion():
                gc.freeze()  # to walk through all that is loaded would stop a cycle for 0.2 s
                worker.serve()
        finally:
            worker.close()


@dataclass
class _Progress:
    """Where this replica is in one partition."""

    position: int
    """The next offset to process."""
    live_from: int
    """Bars before it rebuild state in silence: what they said is already published."""
    snapshot_at: float
    """When the next snapshot is due, on the clock."""

    @property
    def live(self) -> bool:
        return self.position >= self.live_from


class _Batch(NamedTuple):
    """Bars that have been through the engine, with all that is needed to publish what it said."""

    bars: BarColumns
    partitions: NDArray[np.int64]
    live: NDArray[np.bool_]
    processed: Processed
    rejected: list[tuple[Message, str]]
    offsets: dict[tuple[str, int], tuple[int, str]]


class Inference:
    def __init__(
        self, settings: Settings, service: Service, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._service = service
        self._metrics = service.metrics
        self._clock = clock
        self._tail = Tail(settings, LIFECYCLE)
        self._bundles = LiveBundles(
            lambda: [message.value() for message in self._tail.poll()],
            self._opened,
            self._metrics,
        )
        self._snapshots = Snapshots(
            f"{settings.store}/snapshots",
            settings.inference.group,
            keep=settings.inference.snapshots_kept,
            metrics=self._metrics,
        )
        self._snapshot_thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._writing: Future[bool] | None = None
        self._publishing_thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._publishing: Future[None] | None = None
        self._backlog = Backlog()
        self._progress: dict[int, _Progress] = {}
        self._show_at = 0.0

    def wait_for_champion(self) -> bool:
        """Block until a champion is loaded, or until asked to stop (False)."""
        event(log, "waiting_for_champion", topic=LIFECYCLE)
        loaded: dict[str, Runtime] = {}
        while self._service.running:
            self._service.progress()
            loaded |= {runtime.bundle.version: runtime for runtime in self._bundles.poll()}
            record = self._bundles.wanted.get("champion")
            settled = self._tail.caught_up and not self._bundles.loading
            if settled and record and record.bundle in loaded:
                self._open(loaded.pop(record.bundle))
                for runtime in loaded.values():
                    self._add(runtime)
                return True
            self._service.wait(0.01)
        return False

    def serve(self) -> None:
        """Cycle until asked to stop; the last snapshots let a successor start where this one ended."""
        while self._service.running:
            if not self._is_kept(self.cycle):
                self._restore(list(self._progress), rewind=True)
            self._service.progress()
        if self._is_kept(self._settle) and self._is_kept(self._publisher.flush):
            for partition in self._progress:
                self._snapshot(partition)

    def cycle(self) -> None:
        """One bar's way through the house: poll, decode, process; then encode, produce, commit."""
        self._follow_lifecycle()
        self._show_if_due()
        messages = self._poll()
        if not messages:
            self._settle()
            self._publisher.flush()
            return
        started = self._clock()
        bars, places, rejected = decode_bars([message.value() for message in messages])
        self._await_bundles(bars)
        batch = self._processed(messages, bars, places, rejected)
        self._settle()
        if len(messages) < OVERLAPPED_FROM * self._settings.inference.max_batch:
            self._publish(batch)
        else:
            self._publishing = self._publishing_thread.submit(self._publish, batch)
        self._count(batch.processed, started)
        self._snapshot_if_due()

    def close(self) -> None:
        """Abort what is open, leave the group."""
        self._publishing_thread.shutdown()
        if hasattr(self, "_consumer"):
            self._publisher.close()
            self._consumer.close()
        self._snapshot_thread.shutdown()
        self._bundles.close()
        self._tail.close()

    def _opened(self, version: str, uri: str | None) -> Runtime:
        runtime = open_bundle(self._settings, version, uri)
        set_threads(self._settings.inference.torch_threads)  # of a library that came with it, too
        return runtime

    def _poll(self) -> list[Message]:
        """The next batch: what has arrived, a fair share of it where there is more than fits."""
        most, wait_ms = self._settings.inference.max_batch, self._settings.inference.poll_ms
        room = max(1, READ_AHEAD * most - len(self._backlog))
        arrived = poll_batch(self._consumer, room, 0 if self._backlog else wait_ms)
        self._backlog.add(arrived)  # a rebalance has emptied it by now
        return self._backlog.take(most)

    def _processed(
        self,
        messages: list[Message],
        bars: BarColumns,
        places: NDArray[np.intp],
        rejected: list[Rejected],
    ) -> _Batch:
        """Run the engine and move on by what it took; the other messages come again."""
        partitions = np.array([message.partition() for message in messages], np.int64)
        offsets = np.array([message.offset() for message in messages], np.int64)
        live = np.empty(len(messages), np.bool_)
        there = np.bincount(partitions).nonzero()[0].tolist()
        for partition in there:
            here = partitions == partition
            live[here] = offsets[here] >= self._progress[partition].live_from
        processed = self._engine.process(bars, partitions[places])
        taken = len(processed.status)
        end = len(messages) if taken == len(bars) else int(places[taken])
        self._backlog.give_back(messages[end:])
        moved: dict[tuple[str, int], tuple[int, str]] = {}
        for partition in there:
            taken_here = offsets[:end][partitions[:end] == partition]
            if not len(taken_here):
                continue
            progress = self._progress[partition]
            progress.position = int(taken_here[-1]) + 1
            if progress.position > progress.live_from:
                schedule = self._schedule(partition).to_json()
                moved[BARS, partition] = (progress.position, schedule)
        letters = [
            (messages[r.index], r.reason) for r in rejected if r.index < end and live[r.index]
        ]
        return _Batch(bars, partitions[places], live[places], processed, letters, moved)

    def _settle(self) -> None:
        """Wait until the batch before is published. Raises what stopped that."""
        publishing, self._publishing = self._publishing, None
        if publishing is not None:
            publishing.result()

    def _is_kept(self, step: Callable[[], None]) -> bool:
        """Whether a step went through; if not, what the engine did since the last commit is void."""
        try:
            step()
        except TransactionAborted as error:
            self._backlog.clear()
            self._metrics.transactions_aborted.inc()
            event(log, "transaction_aborted", reason=error)
            return False
        return True

    def _open(self, champion: Runtime) -> None:
        config = champion.bundle.config
        self._engine = Engine(
            config.features,
            remembered_bars=config.remembered_bars,
            attention_top=self._settings.inference.attention_top,
            rebuilt_rows=self._settings.inference.max_batch // 2,  # so no cycle takes twice as long
        )
        self._engine.add(champion)
        self._engine.process(NO_BARS, np.zeros(0, np.int64))  # compiles the kernels
        self._consumer = make_consumer(
            self._settings,
            self._settings.inference.group,
            [BARS],
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
        )
        self._watchdog = Watchdog(self._consumer, self._settings, self._service, self._clock)
        self._publisher = make_publisher(self._settings, "inference", self._consumer)
        self._dead_letters = DeadLetters(self._publisher, self._settings.dead_letter, self._metrics)

    def _publish(self, batch: _Batch) -> None:
        """Dead letters, forecasts and offsets go out together; a large batch's in the other thread."""
        for message, reason in batch.rejected:
            self._dead_letters.send(message, reason)
        for forecast in batch.processed.forecasts:
            self._send(forecast, batch.bars, batch.partitions, batch.live)
        started = self._clock()
        self._publisher.commit(batch.offsets)
        self._metrics.commit_seconds.observe(self._clock() - started)
        self._dead_letters.passed(len(batch.processed.status))

    def _send(
        self,
        forecast: Forecast,
        bars: BarColumns,
        partitions: NDArray[np.int64],
        live: NDArray[np.bool_],
    ) -> None:
        """Send each live row's predictions, one for each target, and its attention summary."""
        keep = np.flatnonzero(live[forecast.rows])
        if not len(keep):
            return
        rows = forecast.rows[keep]
        symbols = [bars.symbols[row] for row in rows.tolist()]
        keys = [symbol.encode() for symbol in symbols]
        where = partitions[rows].tolist()
        ts = bars.ts[rows]
        config, version = forecast.bundle.config, forecast.bundle.version
        interval_ms = config.features.interval_ms
        for k, target in enumerate(config.targets):
            chances = forecast.probabilities.get(k)
            self._produce(
                PREDICTIONS,
                keys,
                encode_predictions(
                    symbols,
                    ts,
                    forecast.values[keep, k],
                    None if chances is None else chances[keep],
                    target=target.name,
                    horizon=target.horizon,
                    interval_ms=interval_ms,
                    bundle=version,
                    role=forecast.role,
                    arm=forecast.arm,
                ),
                where,
            )
        self._metrics.predictions.labels(forecast.role).inc(len(rows) * len(config.targets))
        every = self._settings.inference.attention_every
        if not every:
            return
        some = np.flatnonzero((ts // interval_ms) % every == 0)
        attention = forecast.attention
        self._produce(
            ATTENTION,
            [keys[i] for i in some],
            encode_attention(
                [symbols[i] for i in some],
                ts[some],
                attention.ts[keep][some],
                attention.lags[keep][some],
                attention.weights[keep][some],
                attention.entropy[keep][some],
                target=config.targets[0].name,
                bundle=version,
                role=forecast.role,
            ),
            [where[i] for i in some],
        )

    def _produce(
        self, topic: str, keys: Sequence[bytes], values: Sequence[bytes], where: Sequence[int]
    ) -> None:
        self._publisher.produce_all(topic, keys, values, where)
        self._metrics.messages_produced.labels(topic).inc(len(values))

    def _schedule(self, partition: int) -> Schedule:
        return self._engine.schedules.setdefault(partition, Schedule())

    # ---- roles ----

    def _follow_lifecycle(self) -> None:
        """Load what is wanted, give it its role, unload what has lost its own."""
        for runtime in self._bundles.poll():
            self._add(runtime)
        self._give_roles()
        self._retire()

    def _give_roles(self) -> None:
        """Write the wanted slots into every partition's schedule, from the next bar time on."""
        for partition in self._progress:
            schedule = self._schedule(partition)
            for slot, record in self._bundles.wanted.items():
                if schedule.says(slot, record.bundle, record.share):
                    continue
                if record.bundle is not None and record.bundle not in self._engine.bundles:
                    continue
                from_ts = schedule.change(slot, record.bundle, record.effective_ts, record.share)
                self._metrics.swaps.labels(slot).inc()
                self._metrics.bundle.labels(slot).info({"bundle": record.bundle or ""})
                event(
                    log,
                    "swap",
                    partition=partition,
                    role=slot,
                    bundle=record.bundle,
                    effective_ts=record.effective_ts,
                    from_ts=from_ts,
                )

    def _await_bundles(self, bars: BarColumns) -> None:
        """Let no bar of an effective time through while the bundle it was given to is being loaded.

        So a change is at one bar time on every replica, however fast one of them catches up.
        """
        newest_ts = int(bars.ts.max(initial=-1))
        until = self._clock() + AWAITED_S
        while self._service.running and self._clock() < until and self._is_awaited(newest_ts):
            self._service.progress()
            self._service.wait(0.005)
            self._follow_lifecycle()

    def _is_awaited(self, newest_ts: int) -> bool:
        there = self._engine.bundles.keys() | self._bundles.refused
        return any(
            record.bundle is not None
            and record.bundle not in there
            and self._schedule(partition).newest_ts < record.effective_ts <= newest_ts
            for record in self._bundles.wanted.values()
            for partition in self._progress
        )

    def _add(self, runtime: Runtime) -> None:
        try:
            self._engine.add(runtime)
        except BundleRejected as error:
            self._bundles.refuse(runtime.bundle.version, str(error))

    def _retire(self) -> None:
        """Unload the bundles that no bar can need any more; a replay may need any of them."""
        if not all(progress.live for progress in self._progress.values()):
            return
        grace_ms = RETIRED_AFTER_BARS * self._engine.spec.interval_ms
        needed = {record.bundle for record in self._bundles.wanted.values()}
        for schedule in self._engine.schedules.values():
            needed |= schedule.bundles(schedule.newest_ts - grace_ms)
        for version in self._engine.bundles.keys() - needed:
            self._engine.remove(version)
            self._bundles.forget(version)

    # ---- partitions ----

    def _on_assign(self, partitions: Sequence[int]) -> dict[int, int]:
        """Restore what is new here; where to start reading each partition."""
        check_topics(self._settings)  # a partition that was added moves keys: stop with a word
        self._metrics.rebalances.labels("assigned").inc()
        self._let_go()
        for partition in self._progress.keys() - set(partitions):
            del self._progress[partition]
            self._engine.drop(partition)
        self._restore(partitions, rewind=False)
        self._give_roles()  # before the first bar, which may come with this very poll
        return {partition: self._progress[partition].position for partition in partitions}

    def _on_revoke(self, partitions: Sequence[int], lost: bool) -> None:
        """Keep the state: if nobody moves the committed offset meanwhile, it is still right."""
        self._metrics.rebalances.labels("lost" if lost else "revoked").inc()
        self._let_go()

    def _let_go(self) -> None:
        """See the open batch through, while the group still takes our word, and nothing after it.

        Where it fails, the position is past what is committed, and the next assignment restores.
        """
        self._backlog.clear()
        if self._is_kept(self._settle):
            self._is_kept(self._publisher.flush)

    def _restore(self, partitions: Sequence[int], *, rewind: bool) -> None:
        """Bring the partitions' state to their committed offsets, or to before them for a replay."""
        started = self._clock()
        offsets = committed(self._consumer, BARS, partitions)
        due = {
            partition: {BARS: offsets[partition][0]}
            for partition in partitions
            if rewind or not self._holds(partition, offsets[partition][0])
        }
        for partition in due:
            self._engine.drop(partition)
        for left, (partition, snapshot) in zip(
            range(len(due), 0, -1), self._snapshots.load_each(due), strict=True
        ):
            if snapshot is not None:
                self._engine.make_room(int(ROOM * left * len(snapshot.meta["symbols"])))
            self._progress[partition] = self._restored(partition, *offsets[partition], snapshot)
            if rewind:
                seek(self._consumer, BARS, partition, self._progress[partition].position)
            self._service.progress()
        self._metrics.restore_seconds.observe(self._clock() - started)

    def _holds(self, partition: int, offset: int) -> bool:
        """Whether the state here is that of the committed offset."""
        held = self._progress.get(partition)
        return held is not None and held.position == offset

    def _restored(
        self, partition: int, offset: int, metadata: str, snapshot: Snapshot | None
    ) -> _Progress:
        schedule = Schedule.from_json(metadata) if metadata else Schedule()
        oldest_ts = 0
        if snapshot is not None and self._engine.fits(snapshot.meta):
            oldest_ts = Schedule.from_json(snapshot.meta["schedule"]).newest_ts
        else:
            snapshot = None
        grace_ms = RETIRED_AFTER_BARS * self._engine.spec.interval_ms
        for version in schedule.bundles(oldest_ts - grace_ms) - self._engine.bundles.keys():
            self._engine.add(self._bundles.open(version))
        if snapshot is not None:
            self._engine.load(partition, snapshot.arrays, snapshot.meta)
        self._engine.schedules[partition] = schedule
        position = snapshot.offsets[BARS] if snapshot else 0
        event(log, "restored", partition=partition, replay_from=position, live_from=offset)
        every = self._settings.inference.snapshot_every_s
        due = self._clock() + every * (1 + partition % 7 / 7)
        return _Progress(position, offset, due)

    def _snapshot_if_due(self) -> None:
        """Write at most one partition's snapshot at a time, aside, staggered over the partitions."""
        if self._writing is not None and not self._writing.done():
            return
        now = self._clock()
        for partition, progress in self._progress.items():
            if progress.live and now >= progress.snapshot_at:
                self._settle()  # a snapshot stands for what is committed
                progress.snapshot_at = now + self._settings.inference.snapshot_every_s
                self._snapshot(partition)
                return

    def _snapshot(self, partition: int) -> None:
        progress = self._progress[partition]
        if progress.live:
            arrays, meta = self._engine.export(partition)
            self._writing = self._snapshot_thread.submit(
                self._snapshots.save, partition, {BARS: progress.position}, arrays, meta
            )

    # ---- numbers ----

    def _show_if_due(self) -> None:
        now = self._clock()
        if now < self._show_at:
            return
        self._show_at = now + SHOWN_EVERY_S
        self._watchdog.look({(BARS, p): at.position for p, at in self._progress.items()})
        self._metrics.symbols.set(sum(len(self._engine.symbols(p)) for p in self._progress))
        self._metrics.symbols_silent.set(sum(self._engine.silent(p) for p in self._progress))
        self._service.publish(
            partitions={
                partition: {
                    "position": progress.position,
                    "live": progress.live,
                    "newest_ts": self._schedule(partition).newest_ts,
                }
                for partition, progress in self._progress.items()
            },
            refused_bundles=sorted(self._bundles.refused),
        )

    def _count(self, processed: Processed, started: float) -> None:
        status = processed.status
        metrics = self._metrics
        metrics.batch_bars.observe(len(status))
        metrics.messages_consumed.labels(BARS).inc(len(status))
        for name, code in (("reset", RESET), ("duplicate", DUPLICATE), ("late", LATE)):
            metrics.bars.labels(name).inc(int((status == code).sum()))
        predicted = sum(len(f.rows) for f in processed.forecasts if f.role == "champion")
        metrics.bars.labels("ok").inc(predicted)
        metrics.bars.labels("warming").inc(int((status == 0).sum()) - predicted)
        for kind, count in self._engine.take_tally().items():
            metrics.gaps.labels(kind).inc(count)
        seconds = self._clock() - started
        metrics.cycle_seconds.observe(seconds)
        log.debug("cycle", extra={"fields": {"bars": len(status), "ms": round(1e3 * seconds, 3)}})
