"""The trainer: a Faust app that answers alarms, a schedule and people with retrained challengers.

One run at a time, in a child process, so that the event loop goes on. Every step of a run is a
message on `models.training`, and what is there is all the trainer knows in its next life: a run that
was cut off is taken up again from its last checkpoint, and cool-down and daily limits hold across
restarts, also while the database is gone. (A Faust table would keep the same in a changelog of its
own that nobody else can read, and can be written only while an event of its key is processed; runs
are asked for by a timer and by people too.)
"""

import asyncio
import contextlib
import hashlib
import logging
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import faust
from faust.types import StreamT
from pydantic import ValidationError

from schemas.codecs import encode
from schemas.messages import Degradation, Policy, TrainingRun
from schemas.tables import RunRow
from schemas.topics import DEGRADATION, TRAINING
from workers import lifecycle
from workers.bundles import read_bundle
from workers.config import Settings, TrainerSettings
from workers.errors import BundleUnavailable
from workers.kafka import check_topics, make_publisher, read_topic
from workers.logs import event
from workers.retraining import ACTOR, Job, Progress, Result, Said, asked_for
from workers.service import Service
from workers.store import Outbox, Registry, wall_ms

log = logging.getLogger(__name__)

DAY_MS = 24 * 3_600_000
HEARTBEAT_S = 0.2
SCHEDULE_EVERY_S = 10.0
REGISTER_EVERY_S = 60.0
MAX_ATTEMPTS = 3
FINISHED = ("succeeded", "failed", "skipped")

Tell = Callable[[Progress], Awaitable[None]]
Runner = Callable[[Job, Tell], Awaitable[Result]]


def run(settings: Settings) -> None:
    """Serve until asked to stop. Raises what `workers.errors` says a worker exits with."""
    with Service("trainer", settings.http) as service:
        check_topics(settings)
        asyncio.run(_serve(settings, service))


async def _serve(settings: Settings, service: Service) -> None:
    trainer = Trainer(settings, service)
    await trainer.remember()
    app = make_app(settings, trainer)
    await app.start()
    event(log, "listening", topics=[DEGRADATION, TRAINING])
    unfinished = asyncio.create_task(trainer.resume())
    registered_at = time.monotonic()
    try:
        while service.running and not app.crashed:
            service.progress()
            await trainer.flush()
            if time.monotonic() - registered_at > REGISTER_EVERY_S:
                registered_at = time.monotonic()
                await trainer.register_bundles()
            if unfinished.done():
                unfinished.result()
            await asyncio.sleep(HEARTBEAT_S)
        if app.crash_reason is not None:
            raise app.crash_reason
    finally:
        await trainer.cancel()
        unfinished.cancel()
        await app.stop()
        trainer.close()


def make_app(settings: Settings, trainer: "Trainer") -> faust.App:
    app = faust.App(
        settings.trainer.group,
        broker=[f"kafka://{server}" for server in settings.bootstrap_servers.split(",")],
        broker_max_poll_interval=settings.trainer.time_limit_s + 60,
        stream_processing_timeout=settings.trainer.time_limit_s + 60,
        store="memory://",
        datadir=f"{tempfile.gettempdir()}/faust-{settings.trainer.group}",  # made, and left empty
        topic_disable_leader=True,
        topic_allow_declare=False,
        web_enabled=False,
        autodiscover=False,
    )
    alarms = app.topic(DEGRADATION, key_serializer="raw", value_serializer="raw")
    runs = app.topic(TRAINING, key_serializer="raw", value_serializer="raw")

    @app.agent(alarms)
    async def answer_alarm(stream: StreamT[bytes]) -> None:
        async for value in stream:
            await trainer.answer_alarm(value)

    @app.agent(runs)
    async def answer_request(stream: StreamT[bytes]) -> None:
        async for value in stream:
            await trainer.answer_request(value)

    if settings.trainer.retrain_every_days:

        @app.timer(interval=SCHEDULE_EVERY_S)  # type: ignore[untyped-decorator]
        async def answer_schedule() -> None:
            await trainer.answer_schedule()

    return app


def request(
    settings: Settings, reason: str, actor: str, policy: Policy | None = None
) -> TrainingRun:
    """Ask the trainer to retrain the champion, in a person's name. Raises BundleUnavailable without one."""
    champion = lifecycle.current(settings).get("champion")
    if champion is None or champion.bundle is None:
        raise BundleUnavailable("there is no champion to retrain")
    newest_ts = lifecycle.newest_bar_ts(settings)
    asked = TrainingRun(
        id=uuid.uuid4().hex[:16],
        trigger="command",
        actor=actor,
        reason=reason,
        ts=newest_ts,
        since_ts=newest_ts,
        parent=champion.bundle,
        symbols=[],
        policy=policy,
        requested_at=wall_ms(),
    )
    with make_publisher(settings, "request") as publisher:
        publisher.produce(TRAINING, asked.id.encode(), encode(asked))
    return asked


class Trainer:
    """Its `answer_...` never raise for what an event or a training may hold."""

    def __init__(self, settings: Settings, service: Service, runner: Runner | None = None) -> None:
        self._settings, self._metrics = settings, service.metrics
        self._run = runner or self._in_child
        self._runs: dict[str, TrainingRun] = {}
        self._turn = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None
        self._stopping = False
        self._publisher = make_publisher(settings, "trainer")
        self._outbox = Outbox(Registry(settings.database_url), service.metrics)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="registry")
        """The only thread that writes: a database that does not answer stalls nobody else."""

    async def remember(self) -> None:
        """Read what earlier lives did, and write what the registry may have missed of it."""
        await self._put("create", Registry.create)
        for message in await asyncio.to_thread(lambda: list(read_topic(self._settings, TRAINING))):
            found = TrainingRun.model_validate_json(message.value() or b"")
            self._runs[found.id] = found
            if found.status != "requested":
                await self._put("run", partial(Registry.put_run, run=row_of(found)))
        await self.register_bundles()

    async def resume(self) -> None:
        """Take up the runs that an earlier life left unfinished."""
        for found in list(self._runs.values()):
            if found.status not in FINISHED:
                await self._answer(found)

    async def answer_alarm(self, value: bytes | None) -> None:
        try:
            alarm = Degradation.model_validate_json(value or b"")
        except ValidationError as error:
            event(log, "degradation_invalid", reason=error)
            return
        await self._answer(
            TrainingRun(
                id=alarm.id,
                trigger="alarm",
                actor="monitor",
                reason=f"{alarm.target} is worse than its reference (alarm {alarm.id})",
                ts=alarm.ts,
                since_ts=alarm.since_ts,
                new_bars=alarm.bars,
                parent=alarm.bundle,
                symbols=alarm.symbols,
                requested_at=alarm.issued_at,
            )
        )

    async def answer_request(self, value: bytes | None) -> None:
        try:
            asked = TrainingRun.model_validate_json(value or b"")
        except ValidationError as error:
            event(log, "request_invalid", reason=error)
            return
        if asked.status == "requested":
            await self._answer(asked)

    async def answer_schedule(self) -> None:
        if due := await asyncio.to_thread(self._due):
            await self._answer(due)

    async def register_bundles(self) -> None:
        """Enter every bundle that ever had a slot, whoever gave it, as far as that is missing."""
        await self._put("bundle", partial(lifecycle.register_all, settings=self._settings))

    async def flush(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._writer, self._outbox.flush)

    async def cancel(self) -> None:
        """Stop a running child; its run is taken up again in the next life."""
        self._stopping = True
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()

    def _is_stopping(self) -> bool:
        return self._stopping

    def close(self) -> None:
        self._writer.shutdown()
        self._publisher.close()

    async def _answer(self, asked: TrainingRun) -> None:
        """Retrain, or say why not."""
        async with self._turn:
            known = self._runs.get(asked.id, asked)
            if known.status in FINISHED or self._stopping:
                return
            if reason := await asyncio.to_thread(self._reason_against, known):
                await self._say(known, status="skipped", error=reason, finished_at=wall_ms())
                self._metrics.retrains.labels("skipped").inc()
                return
            running = await self._say(
                known,
                status="running",
                attempts=known.attempts + 1,
                started_at=known.started_at or wall_ms(),
            )

            async def tell(progress: Progress) -> None:
                self._metrics.retrain_progress.set(
                    progress.epochs_done / progress.epochs if progress.epochs else 0.0
                )
                await self._say(self._runs[running.id], **progress.model_dump())

            result = await self._run(
                Job(settings=self._settings, run=running, tried=self._tried(running)), tell
            )
            if result.bundle is None and self._is_stopping():
                return
            status = "failed" if result.bundle is None else "succeeded"
            await self._say(
                self._runs[running.id],
                status=status,
                finished_at=wall_ms(),
                **result.model_dump(),
            )
            self._metrics.retrain_progress.set(0.0)
            self._metrics.retrains.labels(status).inc()
            self._metrics.retrain_seconds.observe(result.seconds)
            await self.register_bundles()

    async def _say(self, known: TrainingRun, **changes: Any) -> TrainingRun:
        """Put a run as it is now on the topic, then into the registry."""
        now = known.model_copy(update=changes)
        self._runs[now.id] = now
        await asyncio.to_thread(self._publish, now)
        event(
            log,
            f"retrain_{now.status}",
            run=now.id,
            trigger=now.trigger,
            policy=now.policy,
            epochs_done=now.epochs_done,
            bundle=now.bundle,
            error=now.error,
        )
        await self._put("run", partial(Registry.put_run, run=row_of(now)))
        return now

    def _publish(self, now: TrainingRun) -> None:
        self._publisher.produce(TRAINING, now.id.encode(), encode(now))
        self._publisher.commit({})

    async def _put(self, operation: str, write: Callable[[Registry], object]) -> None:
        await asyncio.get_running_loop().run_in_executor(
            self._writer, self._outbox.put, operation, write
        )

    def _tried(self, asked: TrainingRun) -> list[Policy]:
        """Remedies of earlier alarms on the same champion: it still is, so none was promoted."""
        return [
            run.policy
            for run in self._runs.values()
            if asked.trigger == run.trigger == "alarm"
            and run.parent == asked.parent
            and run.id != asked.id
            and run.policy is not None
            and run.status in FINISHED
        ]

    def _due(self) -> TrainingRun | None:
        """The run that the schedule asks for, if it does."""
        champion = lifecycle.current(self._settings).get("champion")
        if champion is None or champion.bundle is None:
            return None
        days = self._settings.trainer.retrain_every_days
        trained_to = read_bundle(self._settings, champion.bundle, champion.uri).provenance.to_ts
        last_ts = max([trained_to, *(r.ts for r in self._runs.values() if r.status != "skipped")])
        newest_ts = lifecycle.newest_bar_ts(self._settings)
        if newest_ts < last_ts + days * DAY_MS:
            return None
        name = f"{champion.bundle}/{last_ts}"
        return TrainingRun(
            id=hashlib.blake2b(name.encode(), digest_size=8).hexdigest(),
            trigger="schedule",
            actor=ACTOR,
            reason=f"{days:g} days since the champion last saw new bars",
            ts=newest_ts,
            since_ts=newest_ts,
            parent=champion.bundle,
            symbols=[],
            requested_at=wall_ms(),
        )

    def _reason_against(self, asked: TrainingRun) -> str | None:
        slots = lifecycle.current(self._settings)
        champion = slots.get("champion")
        if champion is None or champion.bundle != asked.parent:
            return f"{asked.parent} is no longer the champion"
        others = {name: run for name, run in self._runs.items() if name != asked.id}
        bundle = read_bundle(self._settings, asked.parent, champion.uri)
        policy = asked_for(asked, bundle, self._settings)
        return reason_against(
            asked,
            self._settings.trainer,
            interval_ms=bundle.config.features.interval_ms,
            is_full=lifecycle.free_slot(slots, self._settings, policy) is None,
            others=others,
            now_ms=wall_ms(),
        )

    async def _in_child(self, job: Job, tell: Tell) -> Result:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "workers.retraining",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        self._child = child
        limit_s = self._settings.trainer.time_limit_s
        try:
            return await asyncio.wait_for(_conversation(child, job, tell), limit_s)
        except TimeoutError:
            return Result(seconds=limit_s, error=f"stopped after {limit_s:g} s")
        finally:
            self._child = None
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


async def _conversation(child: asyncio.subprocess.Process, job: Job, tell: Tell) -> Result:
    """Hand over the job, listen to the end; the pipe stays open, for the child dies when it closes."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(job.model_dump_json().encode() + b"\n")
    result: Result | None = None
    async for line in child.stdout:
        said = Said.model_validate_json(line)
        if said.progress is not None:
            await tell(said.progress)
        result = said.result or result
    return result or Result(error=f"the training process exited with {await child.wait()}")


def row_of(run: TrainingRun) -> RunRow:
    return RunRow(
        id=run.id,
        trigger=run.trigger,
        policy=run.policy or "",
        status=run.status,
        started_at=run.started_at or run.requested_at,
        finished_at=run.finished_at,
        bars=run.bars,
        seconds=run.seconds,
        bundle=run.bundle,
        error=run.error,
        actor=run.actor,
        reason=run.reason,
        ts=run.ts,
        parent=run.parent,
        attempts=run.attempts,
        evidence=run.evidence,
    )


def reason_against(
    asked: TrainingRun,
    settings: TrainerSettings,
    *,
    interval_ms: int,
    is_full: bool,
    others: Mapping[str, TrainingRun],
    now_ms: int,
) -> str | None:
    """Why a run on the present champion is not begun; None if it is.

    A person's word overrides cool-down and daily limits, but not that `is_full`: so many challengers
    as may be are being compared. A run that was begun goes on. `others`: all other runs, of any life.
    """
    if is_full and not asked.attempts:
        return "as many challengers as may be are still being compared"
    if asked.attempts >= MAX_ATTEMPTS:
        return f"the trainer died in {asked.attempts} attempts"
    if asked.trigger == "command" or asked.attempts:
        return None
    if asked.new_bars is not None and asked.new_bars < settings.least_new_bars:
        return f"{asked.new_bars} bars since the champion became worse: too few to learn from"
    answered = [run for run in others.values() if run.status not in ("skipped", "requested")]
    is_repeated = any(
        (run.trigger, run.parent, run.since_ts) == ("alarm", asked.parent, asked.since_ts)
        for run in answered
    )
    quiet_until = max((run.ts for run in answered), default=-1)
    quiet_until += settings.cool_down_bars * interval_ms
    if answered and asked.ts < quiet_until and not is_repeated:
        return "cool-down"
    today = [run for run in answered if (run.started_at or 0) >= now_ms - DAY_MS]
    if len(today) >= settings.max_retrains_per_day:
        return f"{len(today)} retrains in a day"
    if (seconds := sum(run.seconds for run in today)) >= settings.max_seconds_per_day:
        return f"{seconds:.0f} s of training in a day"
    return None
