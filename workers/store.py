"""The registry database: what was trained, how it did, who promoted it. The only sessions there are.

SQLite by default, PostgreSQL by psycopg. Every write may be repeated without harm, so a caller
that does not know whether one arrived simply does it again (`Outbox` does).
"""

import hashlib
import json
import logging
import sqlite3
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from schemas.tables import (
    REVISION,
    REVISION_TABLE,
    AuditHead,
    AuditRow,
    Base,
    BundleRow,
    DegradationRow,
    RunRow,
    WindowRow,
    revision_table,
)
from workers.errors import RegistryUnavailable, SchemaMismatch
from workers.logs import event
from workers.metrics import Metrics

log = logging.getLogger(__name__)

GENESIS = "0" * 64
"""`previous` of the first audit row."""
CONNECT_TIMEOUT_S = 3
STATEMENT_TIMEOUT_S = 10
"""Also how long a write waits for the lock of another one."""

T = TypeVar("T")


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


class Registry:
    """Safe to share between threads. Rows handed out are plain records, cut off from the database.

    Every verb raises RegistryUnavailable when the database cannot be reached or stays locked.
    """

    def __init__(self, url: str, *, clock: Callable[[], int] = wall_ms) -> None:
        self._engine = open_engine(url)
        self._clock = clock

    def create(self) -> None:
        """Make the tables of an empty database; check the revision of one that has them.

        Raises SchemaMismatch when the database is of another revision.
        """
        with _reachable():
            if self._revision() is None:
                try:
                    self._create_tables()
                except DBAPIError:
                    # Another worker made them in the same moment, or this error is ours.
                    if self._revision() is None:
                        raise
            found = self._revision()
        if found != REVISION:
            raise SchemaMismatch(
                f"the registry is at revision {found}, this version needs {REVISION}: "
                "run `alembic -c deploy/alembic.ini upgrade head`"
            )

    def close(self) -> None:
        self._engine.dispose()

    # ---- bundles ----

    def add_bundle(self, bundle: BundleRow) -> None:
        """Register a bundle; the same again changes nothing, another under its name is refused."""

        def add(session: Session) -> None:
            known = session.get(BundleRow, bundle.version)
            if known is None:
                session.merge(bundle)
            elif known.sha256 != bundle.sha256:
                raise ValueError(f"bundle {bundle.version} is registered with other content")

        self._write(add)

    def bundle(self, version: str) -> BundleRow | None:
        with self._session() as session:
            return session.get(BundleRow, version)

    def bundles(self, limit: int = 100) -> list[BundleRow]:
        """Newest first."""
        newest = BundleRow.created_at.desc()
        return self._rows(sa.select(BundleRow).order_by(newest, BundleRow.version).limit(limit))

    # ---- training runs ----

    def put_run(self, run: RunRow) -> None:
        """Store a run as it stands now; each status it goes through is a row of the audit, once."""

        def put(session: Session) -> None:
            session.merge(run)
            _append(
                session,
                key=f"training/{run.id}/{run.status}",
                at=run.finished_at or run.started_at,
                actor=run.actor or "trainer",
                slot="training",
                from_bundle=run.parent,
                to_bundle=run.bundle,
                reason=_told(run),
                evidence={**(run.evidence or {}), "run": run.id, "status": run.status},
            )

        self._write(put)

    def runs(
        self, *, status: str | None = None, started_since: int = 0, limit: int = 100
    ) -> list[RunRow]:
        """Newest first; `started_since` is epoch ms."""
        query = sa.select(RunRow).where(RunRow.started_at >= started_since)
        if status is not None:
            query = query.where(RunRow.status == status)
        return self._rows(query.order_by(RunRow.started_at.desc(), RunRow.id).limit(limit))

    # ---- performance ----

    def add_windows(self, windows: Sequence[WindowRow]) -> None:
        """Store windows; the same window again replaces it."""

        def add(session: Session) -> None:
            for window in windows:
                session.merge(window)

        self._write(add)

    def windows(self, bundle: str, target: str) -> list[WindowRow]:
        """Oldest first, all roles."""
        return self._rows(
            sa.select(WindowRow)
            .where(WindowRow.bundle == bundle, WindowRow.target == target)
            .order_by(WindowRow.from_ts, WindowRow.to_ts, WindowRow.role)
        )

    def add_degradation(self, degradation: DegradationRow) -> None:
        """Store one event, and its row of the audit; the same id again replaces it."""

        def add(session: Session) -> None:
            session.merge(degradation)
            _append(
                session,
                key=f"alarm/{degradation.id}",
                at=degradation.issued_at,
                actor="monitor",
                slot="alarm",
                from_bundle=degradation.bundle,
                to_bundle=None,
                reason=f"{degradation.target} worse than the reference",
                evidence={
                    "degradation": degradation.id,
                    "detector": degradation.detector,
                    "statistic": degradation.statistic,
                    "threshold": degradation.threshold,
                    "arl0": degradation.arl0,
                    "excess_loss": degradation.excess_loss,
                    "since_ts": degradation.since_ts,
                    "ts": degradation.ts,
                },
            )

        self._write(add)

    def degradations(self, limit: int = 100) -> list[DegradationRow]:
        """Newest first."""
        newest = DegradationRow.ts.desc()
        return self._rows(
            sa.select(DegradationRow).order_by(newest, DegradationRow.id).limit(limit)
        )

    # ---- audit ----

    def record(
        self,
        *,
        actor: str,
        slot: str,
        from_bundle: str | None,
        to_bundle: str | None,
        reason: str,
        evidence: Mapping[str, object] | None = None,
        key: str | None = None,
        at: int | None = None,
    ) -> AuditRow:
        """Append to the audit; the same `key` again appends nothing and returns the row there is.

        `evidence` is JSON without NaN or infinity (ValueError); `at` is epoch ms, now by default.
        """
        entry: dict[str, Any] = {
            "key": key or uuid.uuid4().hex,
            "at": self._clock() if at is None else at,
            "actor": actor,
            "slot": slot,
            "from_bundle": from_bundle,
            "to_bundle": to_bundle,
            "reason": reason,
            "evidence": evidence or {},
        }
        return self._write(lambda session: _append(session, **entry))

    def history(self, slot: str | None = None, limit: int | None = None) -> list[AuditRow]:
        """The newest `limit` entries, or all; oldest first."""
        query = sa.select(AuditRow).order_by(AuditRow.seq.desc()).limit(limit)
        if slot is not None:
            query = query.where(AuditRow.slot == slot)
        return self._rows(query)[::-1]

    def verify(self) -> list[str]:
        """What is wrong with the audit, in words; empty if every row is as it was written."""
        with self._session() as session:
            # One statement is one view of the database, however much is appended meanwhile.
            pairs = session.execute(
                sa.select(AuditHead, AuditRow).outerjoin(AuditRow, sa.true()).order_by(AuditRow.seq)
            ).all()
        head = pairs[0][0] if pairs else None
        return list(broken_links((row for _, row in pairs if row is not None), head))

    # ---- sessions ----

    def _rows(self, query: sa.Select[T]) -> list[T]:
        with self._session() as session:
            return list(session.scalars(query))

    def _write(self, work: Callable[[Session], T]) -> T:
        """Run `work` in one transaction, and once more if another writer added the same row first."""
        try:
            with self._session(writing=True) as session:
                return work(session)
        except IntegrityError:
            with self._session(writing=True) as session:
                return work(session)

    @contextmanager
    def _session(self, *, writing: bool = False) -> Iterator[Session]:
        with (
            _reachable(),
            self._engine.connect().execution_options(writing=writing) as connection,
            Session(connection, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def _revision(self) -> str | None:
        with self._engine.connect() as connection:
            if not sa.inspect(connection).has_table(REVISION_TABLE):
                return None
            return connection.scalar(sa.select(revision_table.c.version_num))

    def _create_tables(self) -> None:
        with (
            self._engine.connect().execution_options(writing=True) as connection,
            connection.begin(),
        ):
            Base.metadata.create_all(connection, checkfirst=False)
            revision_table.create(connection, checkfirst=True)  # empty after a downgrade to base
            connection.execute(sa.insert(revision_table).values(version_num=REVISION))
            connection.execute(sa.insert(AuditHead).values(id=0, seq=0, hash=GENESIS))


def _append(
    session: Session, *, key: str, evidence: Mapping[str, object], **columns: Any
) -> AuditRow:
    """The next link of the audit, or the one there is of that key."""
    as_stored = json.loads(json.dumps(dict(evidence), allow_nan=False))
    # Touching the head comes first: whoever appends waits here for the one before.
    touch = sa.update(AuditHead).values(seq=AuditHead.seq)
    seq, previous = session.execute(touch.returning(AuditHead.seq, AuditHead.hash)).one()
    known = session.scalar(sa.select(AuditRow).where(AuditRow.key == key))
    if known is not None:
        return known
    row = AuditRow(seq=seq + 1, key=key, evidence=as_stored, previous=previous, hash="", **columns)
    row.hash = link_hash(row)
    session.add(row)
    session.execute(sa.update(AuditHead).values(seq=row.seq, hash=row.hash))
    return row


def _told(run: RunRow) -> str:
    match run.status:
        case "succeeded":
            return f"{run.policy}: {run.reason}"
        case "failed" | "skipped":
            return f"{run.error}; asked because: {run.reason}"
        case _:
            return str(run.reason)


def link_hash(row: AuditRow) -> str:
    """SHA-256 of every column but `hash`, as JSON with sorted keys."""
    columns = {c.key: getattr(row, c.key) for c in AuditRow.__table__.columns if c.key != "hash"}
    text = json.dumps(columns, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def broken_links(rows: Iterable[AuditRow], head: AuditHead | None) -> Iterator[str]:
    """Where the chain of `rows`, in order of seq, does not hold up to `head`."""
    seq, tip = 0, GENESIS
    for row in rows:
        if row.seq != seq + 1:
            yield f"rows are missing between {seq} and {row.seq}"
        elif row.previous != tip:
            yield f"row {row.seq} does not follow row {seq}"
        if link_hash(row) != row.hash:
            yield f"row {row.seq} was changed"
        seq, tip = row.seq, row.hash
    if head is None:
        yield "the head is missing"
    elif (head.seq, head.hash) != (seq, tip):
        yield f"the newest row is {seq}, but the head says {head.seq} with {head.hash[:12]}"


def open_engine(url: str) -> sa.Engine:
    """An engine for `sqlite:///...` or `postgresql://...`; connects on first use."""
    parsed = sa.make_url(url)
    match parsed.get_backend_name():
        case "sqlite":
            return _open_sqlite(parsed)
        case "postgresql" | "postgres":
            return _open_postgres(parsed.set(drivername="postgresql+psycopg"))
        case other:
            raise ValueError(f"the registry runs on sqlite or postgresql, not on {other}")


def _open_sqlite(url: sa.URL) -> sa.Engine:
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, connect_args={"timeout": STATEMENT_TIMEOUT_S})

    def prepare(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver would begin late and leave DDL outside
        _log_ahead(connection)

    def begin(connection: sa.Connection) -> None:
        # A write that begins as a read cannot wait for the lock: it fails at once.
        writing = connection.get_execution_options().get("writing")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    sa.event.listen(engine, "connect", prepare)
    sa.event.listen(engine, "begin", begin)
    return engine


def _log_ahead(connection: Any) -> None:
    """Put a database into WAL mode; SQLite itself does not wait for the lock that the first one needs."""
    until = time.monotonic() + STATEMENT_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def _open_postgres(url: sa.URL) -> sa.Engine:
    timeout_ms = STATEMENT_TIMEOUT_S * 1000
    return sa.create_engine(
        url,
        pool_pre_ping=True,
        pool_size=2,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "tcp_user_timeout": timeout_ms,
            "options": f"-c statement_timeout={timeout_ms}",
            "application_name": "gpt-trader-stream",
        },
    )


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        cause = getattr(error, "orig", None) or error
        raise RegistryUnavailable(f"registry database: {str(cause).strip()}") from error


class Outbox:
    """Registry writes in order, that wait here while the database is gone.

    For writes that may be repeated: give `record` a key. While the database is gone it is tried at
    most every `retry_after_s`. What waits is lost with the process, so everything that goes through
    here is on a topic too, and each life of a worker begins with writing that again.
    """

    def __init__(
        self,
        registry: Registry,
        metrics: Metrics,
        *,
        capacity: int = 10_000,
        retry_after_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry, self._metrics = registry, metrics
        self._capacity, self._retry_after_s, self._clock = capacity, retry_after_s, clock
        self._waiting: deque[tuple[str, Callable[[Registry], object]]] = deque()
        self._retry_at: float | None = None

    def put(self, operation: str, write: Callable[[Registry], object]) -> None:
        """Write, now or later; RegistryUnavailable once `capacity` writes wait."""
        if len(self._waiting) >= self._capacity and self.flush() >= self._capacity:
            raise RegistryUnavailable(f"{len(self._waiting)} writes wait for the registry database")
        self._waiting.append((operation, write))
        self.flush()

    def flush(self) -> int:
        """Write what waits as far as the database lets; how many still wait."""
        if self._retry_at is not None and self._clock() < self._retry_at:
            return len(self._waiting)
        while self._waiting:
            operation, write = self._waiting[0]
            try:
                write(self._registry)
            except RegistryUnavailable as error:
                self._metrics.registry_errors.labels(operation).inc()
                if self._retry_at is None:
                    event(log, "registry_gone", error=error)
                self._retry_at = self._clock() + self._retry_after_s
                return len(self._waiting)
            self._waiting.popleft()
        if self._retry_at is not None:
            event(log, "registry_back")
            self._retry_at = None
        return 0
