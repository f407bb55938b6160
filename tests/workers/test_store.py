import json
import math
import sqlite3
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import methodcaller
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import given, settings
from hypothesis import strategies as st

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
)
from workers import store
from workers.errors import RegistryUnavailable, SchemaMismatch
from workers.metrics import Metrics
from workers.store import GENESIS, Outbox, Registry, broken_links, link_hash, open_engine

DEPLOY = Path(__file__).parents[2] / "deploy"


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000_000

    def __call__(self) -> int:
        self.now += 1
        return self.now


@pytest.fixture
def registry(database_url: str) -> Iterator[Registry]:
    registry = Registry(database_url, clock=Clock())
    registry.create()
    yield registry
    registry.close()


def make_bundle(version: str = "b1", **changes: Any) -> BundleRow:
    fields: dict[str, Any] = {
        "version": version,
        "uri": f"store/bundles/{version}",
        "sha256": "ab" * 32,
        "parent": None,
        "data_from_ts": 1_483_281_000_000,
        "data_to_ts": 1_514_498_400_000,
        "seed": 7,
        "code_version": "0.1.0",
        "metrics": {"qlike": 0.1 + 0.2, "epochs": 3, "targets": ["volatility_30"]},
        "created_at": 1_700_000_000_000,
    }
    return BundleRow(**fields | changes)


def make_window(from_ts: int = 0, **changes: Any) -> WindowRow:
    fields: dict[str, Any] = {
        "bundle": "b1",
        "role": "champion",
        "target": "volatility_30",
        "from_ts": from_ts,
        "to_ts": from_ts + 60_000,
        "n": 390,
        "mean_loss": 0.25,
        "mean_reference_loss": 0.5,
    }
    return WindowRow(**fields | changes)


def make_degradation(
    identity: str = "d1", ts: int = 1_517_800_000_000, inputs: dict[str, Any] | None = None
) -> DegradationRow:
    return DegradationRow(
        id=identity,
        bundle="b1",
        target="volatility_30",
        detector="cusum",
        statistic=12.5,
        threshold=12.0,
        arl0=20_000.0,
        since_ts=ts - 600_000,
        ts=ts,
        symbols=["SPY", "ÅÄÖ"],
        excess_loss=0.4,
        issued_at=ts + 5,
        inputs=inputs,
    )


def promote(registry: Registry, bundle: str = "b2", **changes: Any) -> AuditRow:
    fields: dict[str, Any] = {
        "actor": "monitor",
        "slot": "champion",
        "from_bundle": "b1",
        "to_bundle": bundle,
        "reason": "live evidence",
        "evidence": {"e_value": 1 / 3, "n": 400, "unit": "nats – é"},
    }
    return registry.record(**fields | changes)


def execute(url: str, statement: str, **values: object) -> None:
    engine = open_engine(url)
    with engine.connect().execution_options(writing=True) as connection, connection.begin():
        connection.execute(sa.text(statement), values)
    engine.dispose()


# ---- one contract, both databases ----


def test_a_bundle_comes_back_as_it_was_added(registry: Registry) -> None:
    registry.add_bundle(make_bundle())
    assert registry.bundle("b1") == make_bundle()
    assert registry.bundle("b2") is None


def test_the_same_bundle_twice_is_one_and_another_under_its_name_is_refused(
    registry: Registry,
) -> None:
    registry.add_bundle(make_bundle())
    registry.add_bundle(make_bundle())
    with pytest.raises(ValueError, match="b1 is registered with other content"):
        registry.add_bundle(make_bundle(sha256="cd" * 32))
    assert registry.bundles() == [make_bundle()]


def test_bundles_are_listed_newest_first_and_limited(registry: Registry) -> None:
    for i in range(5):
        registry.add_bundle(make_bundle(f"b{i}", created_at=i))
    assert [b.version for b in registry.bundles(limit=3)] == ["b4", "b3", "b2"]


def make_run(identity: str = "r1", status: str = "running", **changes: Any) -> RunRow:
    fields: dict[str, Any] = {
        "id": identity,
        "trigger": "command",
        "policy": "fine_tune",
        "status": status,
        "started_at": 1_700_000_000_000,
        "actor": "anna",
        "reason": "new exchange hours",
        "ts": 1_517_800_000_000,
        "parent": "b1",
        "attempts": 1,
        "evidence": {"level_share": 0.25},
    }
    return RunRow(**fields | changes)


def test_a_training_run_is_followed_to_its_end_and_audited_once_a_status(
    registry: Registry,
) -> None:
    closed = make_run(status="succeeded", finished_at=1_700_000_900_000, bars=9, bundle="b2")
    for run in (make_run(), make_run(attempts=2), closed, closed):
        registry.put_run(run)
    assert registry.runs() == [closed]
    assert registry.runs(status="running") == []
    started, finished = registry.history("training")
    assert (started.actor, started.reason, started.to_bundle) == (
        "anna",
        "new exchange hours",
        None,
    )
    assert (finished.from_bundle, finished.to_bundle) == ("b1", "b2")
    assert finished.reason == "fine_tune: new exchange hours"
    assert finished.at == 1_700_000_900_000
    assert finished.evidence["level_share"] == 0.25
    assert registry.verify() == []


def test_a_failed_run_keeps_its_error_in_full(registry: Registry) -> None:
    error = "loss is not finite\n" * 1_000
    registry.put_run(make_run(status="failed", error=error))
    assert registry.runs()[0].error == error
    assert error in registry.history("training")[0].reason


def test_runs_are_listed_newest_first_and_since_a_time(registry: Registry) -> None:
    for i in range(3):
        registry.put_run(make_run(f"r{i}", started_at=i))
    assert [run.id for run in registry.runs(started_since=1)] == ["r2", "r1"]


def test_a_window_counted_again_replaces_itself(registry: Registry) -> None:
    registry.add_windows([make_window(60_000)])
    registry.add_windows([make_window(0, n=1)])
    registry.add_windows([make_window(0)])
    registry.add_windows([make_window(0, target="direction_30")])
    assert registry.windows("b1", "volatility_30") == [make_window(0), make_window(60_000)]


def test_an_alarm_that_is_said_again_with_its_inputs_is_one(registry: Registry) -> None:
    measured = make_degradation(inputs={"rows": 390, "psi": {"volume": 0.5}})
    registry.add_degradation(make_degradation())
    registry.add_degradation(measured)
    assert registry.degradations() == [measured]
    assert len(registry.history("alarm")) == 1


def test_a_degradation_comes_back_and_is_kept_once(registry: Registry) -> None:
    registry.add_degradation(make_degradation())
    registry.add_degradation(make_degradation())
    registry.add_degradation(make_degradation("d2", ts=1_517_900_000_000))
    newest, oldest = registry.degradations()
    assert newest.id == "d2"
    assert oldest == make_degradation()
    first, second = registry.history("alarm")
    assert (first.from_bundle, first.evidence["degradation"]) == ("b1", "d1")
    assert second.evidence["statistic"] == 12.5


def test_added_rows_stay_the_callers_own(registry: Registry) -> None:
    window = make_window()
    registry.add_windows([window])
    window.n = -1
    registry.add_windows([make_window(60_000)])
    assert registry.windows("b1", "volatility_30")[0].n == 390


def test_create_again_keeps_what_is_there(registry: Registry, database_url: str) -> None:
    registry.add_bundle(make_bundle())
    again = Registry(database_url)
    again.create()
    assert again.bundles() == registry.bundles()
    again.close()


def test_workers_that_start_together_make_the_tables_once(database_url: str) -> None:
    together = Barrier(12)

    def start(_: int) -> None:
        registry = Registry(database_url)
        together.wait()
        registry.create()
        promote(registry)
        registry.close()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(start, range(12)))
    registry = Registry(database_url)
    assert len(registry.history()) == 12
    assert registry.verify() == []
    registry.close()


def test_a_database_of_another_revision_is_refused(registry: Registry, database_url: str) -> None:
    execute(database_url, f"UPDATE {REVISION_TABLE} SET version_num = '0000'")
    with pytest.raises(SchemaMismatch, match=r"at revision 0000.*alembic .* upgrade head"):
        registry.create()


@pytest.mark.parametrize("url", ["mysql://localhost/x", "mssql://x", "duckdb:///x"])
def test_other_databases_are_refused_by_name(url: str) -> None:
    with pytest.raises(ValueError, match=url.partition(":")[0]):
        Registry(url)


# ---- audit ----


def test_the_audit_says_who_when_which_from_to_and_why(registry: Registry) -> None:
    first = promote(registry)
    second = promote(registry, bundle="b3", slot="challenger", actor="anna", at=5)
    assert registry.history() == [first, second]
    assert registry.history(slot="challenger") == [second]
    assert registry.history(limit=1) == [second]
    assert (second.seq, second.actor, second.at, second.previous) == (2, "anna", 5, first.hash)
    assert first.evidence == {"e_value": 1 / 3, "n": 400, "unit": "nats – é"}
    assert registry.verify() == []


def test_an_empty_audit_is_whole(registry: Registry) -> None:
    assert registry.history() == []
    assert registry.verify() == []


def test_an_append_with_the_same_key_is_one_row(registry: Registry) -> None:
    first = promote(registry, key="promotion-1")
    again = promote(registry, key="promotion-1", reason="said differently")
    promote(registry, key="promotion-2")
    assert again == first
    assert [row.key for row in registry.history()] == ["promotion-1", "promotion-2"]
    assert registry.verify() == []


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_evidence_that_is_no_json_is_refused_and_leaves_no_trace(
    registry: Registry, number: float
) -> None:
    with pytest.raises(ValueError, match="JSON"):
        promote(registry, evidence={"gain": number})
    assert registry.history() == []
    assert registry.verify() == []


def test_appends_from_many_processes_are_one_chain(database_url: str) -> None:
    def work(worker: int) -> None:
        registry = Registry(database_url)
        for i in range(10):
            promote(registry, key=f"{worker}-{i}")
            promote(registry, key=f"shared-{i}")
        registry.close()

    registry = Registry(database_url)
    registry.create()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    rows = registry.history()
    assert [row.seq for row in rows] == list(range(1, 71))
    assert len({row.key for row in rows}) == 70
    assert registry.verify() == []
    registry.close()


@pytest.mark.parametrize(
    ("tamper", "finding"),
    [
        ("UPDATE lifecycle_audit SET reason = 'luck' WHERE seq = 3", "row 3 was changed"),
        ("UPDATE lifecycle_audit SET at = at - 1 WHERE seq = 1", "row 1 was changed"),
        ("UPDATE lifecycle_audit SET evidence = '{}' WHERE seq = 5", "row 5 was changed"),
        ("UPDATE lifecycle_audit SET to_bundle = NULL WHERE seq = 4", "row 4 was changed"),
        ("DELETE FROM lifecycle_audit WHERE seq = 1", "rows are missing between 0 and 2"),
        ("DELETE FROM lifecycle_audit WHERE seq IN (2, 3)", "rows are missing between 1 and 4"),
        ("DELETE FROM lifecycle_audit WHERE seq = 5", "the newest row is 4, but the head says 5"),
        ("DELETE FROM lifecycle_audit", "the newest row is 0, but the head says 5"),
        ("DELETE FROM lifecycle_audit_head", "the head is missing"),
        ("UPDATE lifecycle_audit SET seq = 9 WHERE seq = 5", "rows are missing between 4 and 9"),
        (
            f"UPDATE lifecycle_audit SET hash = '{'f' * 64}' WHERE seq = 2",
            "row 3 does not follow row 2",
        ),
    ],
)
def test_verify_finds(registry: Registry, database_url: str, tamper: str, finding: str) -> None:
    for i in range(5):
        promote(registry, bundle=f"b{i}", evidence={"n": i, "hash": "e" * 8})
    execute(database_url, tamper)
    assert any(finding in found for found in registry.verify()), registry.verify()


def test_verify_finds_two_rows_that_changed_places(registry: Registry, database_url: str) -> None:
    for i in range(4):
        promote(registry, bundle=f"b{i}")
    for a, b in ((2, 99), (3, 2), (99, 3)):
        execute(database_url, "UPDATE lifecycle_audit SET seq = :b WHERE seq = :a", a=a, b=b)
    found = registry.verify()
    assert "row 2 was changed" in found
    assert "row 2 does not follow row 1" in found


def test_verify_while_others_append_raises_no_false_alarm(registry: Registry) -> None:
    with ThreadPoolExecutor(1) as pool:
        appending = pool.submit(lambda: [promote(registry) for _ in range(60)])
        while not appending.done():
            assert registry.verify() == []
    assert len(registry.history()) == 60


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
evidences = st.dictionaries(
    names, st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), names)
)


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[AuditRow], AuditHead]:
    rows: list[AuditRow] = []
    tip = GENESIS
    for seq in range(1, draw(st.integers(2, 6)) + 1):
        row = AuditRow(
            seq=seq,
            key=f"k{seq}",
            at=draw(st.integers(0, 2**41)),
            actor=draw(names),
            slot=draw(names),
            from_bundle=draw(st.none() | names),
            to_bundle=draw(st.none() | names),
            reason=draw(names),
            evidence=draw(evidences),
            previous=tip,
            hash="",
        )
        tip = row.hash = link_hash(row)
        rows.append(row)
    return rows, AuditHead(id=0, seq=len(rows), hash=tip)


@settings(max_examples=40)
@given(chains())
def test_an_untouched_chain_is_whole(chain: tuple[list[AuditRow], AuditHead]) -> None:
    assert list(broken_links(*chain)) == []


@settings(max_examples=40)
@given(chains(), st.data())
def test_any_change_to_any_column_breaks_the_chain(
    chain: tuple[list[AuditRow], AuditHead], data: st.DataObject
) -> None:
    rows, head = chain
    row = data.draw(st.sampled_from(rows))
    column = data.draw(st.sampled_from([c.key for c in AuditRow.__table__.columns]))
    old = getattr(row, column)
    new = data.draw(
        st.integers(1, 2**40)
        if column in ("seq", "at")
        else evidences
        if column == "evidence"
        else names
    )
    setattr(row, column, new)
    rows.sort(key=lambda r: r.seq)
    assert (list(broken_links(rows, head)) == []) == (json.dumps(old) == json.dumps(new))


@settings(max_examples=40)
@given(chains(), st.data())
def test_any_removal_or_new_order_breaks_the_chain(
    chain: tuple[list[AuditRow], AuditHead], data: st.DataObject
) -> None:
    rows, head = chain
    kept = data.draw(
        st.permutations(rows).flatmap(lambda p: st.sampled_from([p[:n] for n in range(len(p) + 1)]))
    )
    if kept != rows:
        assert list(broken_links(kept, head))


@settings(max_examples=40)
@given(chains(), st.data())
def test_a_forged_row_breaks_the_chain_even_with_a_right_hash_of_its_own(
    chain: tuple[list[AuditRow], AuditHead], data: st.DataObject
) -> None:
    rows, head = chain
    row = data.draw(st.sampled_from(rows))
    row.actor += "!"
    row.hash = link_hash(row)
    assert list(broken_links(rows, head))


# ---- the database is gone ----

Outage = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def outage(
    database_url: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Outage:
    """Makes the database unusable for a while: locked (SQLite), or shut with all sessions cut."""
    if database_url.startswith("sqlite"):
        monkeypatch.setattr(store, "STATEMENT_TIMEOUT_S", 0.05)

        @contextmanager
        def locked() -> Iterator[None]:
            other = sqlite3.connect(database_url.removeprefix("sqlite:///"), isolation_level=None)
            other.execute("BEGIN EXCLUSIVE")
            yield
            other.execute("ROLLBACK")
            other.close()

        return locked

    name = str(sa.make_url(database_url).database)
    server: str = request.getfixturevalue("postgres_server")

    def admin(statement: str) -> None:
        engine = open_engine(server).execution_options(isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(statement))
        engine.dispose()

    @contextmanager
    def shut() -> Iterator[None]:
        admin(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        admin(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        yield
        admin(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")

    return shut


def test_a_database_that_is_gone_is_one_clear_error_and_comes_back(
    outage: Outage, registry: Registry
) -> None:
    promote(registry)
    with outage(), pytest.raises(RegistryUnavailable, match="registry database: "):
        promote(registry)
    promote(registry)
    assert len(registry.history()) == 2
    assert registry.verify() == []


def test_a_server_that_does_not_answer_is_unavailable_too() -> None:
    registry = Registry("postgresql://nobody@127.0.0.1:1/none")
    for verb in (registry.create, registry.bundles, registry.verify):
        with pytest.raises(RegistryUnavailable, match="refused"):
            verb()


def test_the_password_is_not_in_the_error() -> None:
    registry = Registry("postgresql://nobody:geheim@127.0.0.1:1/none")
    with pytest.raises(RegistryUnavailable) as caught:
        registry.create()
    assert "geheim" not in str(caught.value)


def test_a_session_cut_by_the_server_is_not_noticed_by_the_next_caller(
    postgres_url: str, postgres_server: str
) -> None:
    registry = Registry(postgres_url)
    registry.create()
    promote(registry)
    name = sa.make_url(postgres_url).database
    execute(
        postgres_server,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name",
        name=name,
    )
    promote(registry)
    assert registry.verify() == []
    registry.close()


def test_the_outbox_writes_at_once_while_the_database_is_there(registry: Registry) -> None:
    outbox = Outbox(registry, Metrics())
    outbox.put("add_bundle", lambda r: r.add_bundle(make_bundle()))
    assert registry.bundles() == [make_bundle()]
    assert outbox.flush() == 0


def test_the_outbox_keeps_order_and_loses_nothing_over_an_outage(
    outage: Outage, registry: Registry
) -> None:
    now = [0.0]
    metrics = Metrics()
    outbox = Outbox(registry, metrics, retry_after_s=5.0, clock=lambda: now[0])
    with outage():
        for i in range(4):
            outbox.put("record", partial(promote, bundle=f"b{i}", key=f"k{i}"))
        assert outbox.flush() == 4
    assert outbox.flush() == 4, "the database is left alone for a while"
    now[0] += 5.0
    assert outbox.flush() == 0
    assert [row.to_bundle for row in registry.history()] == ["b0", "b1", "b2", "b3"]
    assert registry.verify() == []
    failures = {"operation": "record"}
    assert metrics.registry.get_sample_value("gpt_trader_registry_errors_total", failures) == 1


def test_a_full_outbox_refuses_instead_of_forgetting(outage: Outage, registry: Registry) -> None:
    outbox = Outbox(registry, Metrics(), capacity=2, clock=lambda: 0.0)
    with outage():
        for i in range(2):
            outbox.put("add_windows", methodcaller("add_windows", [make_window(i)]))
        with pytest.raises(RegistryUnavailable, match="2 writes wait"):
            outbox.put("add_windows", lambda r: r.add_windows([make_window(2)]))
    assert outbox.flush() == 2


# ---- migrations ----


def alembic(url: str) -> Config:
    return Config(DEPLOY / "alembic.ini", cmd_opts=Namespace(x=[f"url={url}"]))


def schema_of(url: str) -> dict[str, Any]:
    engine = open_engine(url)
    with engine.connect() as connection:
        inspector = sa.inspect(connection)
        schema: dict[str, Any] = {
            table: {
                "columns": [
                    {**column, "type": str(column["type"])}
                    for column in inspector.get_columns(table)
                ],
                "primary key": inspector.get_pk_constraint(table),
                "indexes": inspector.get_indexes(table),
                "unique": inspector.get_unique_constraints(table),
                "foreign keys": inspector.get_foreign_keys(table),
            }
            for table in sorted(inspector.get_table_names())
        }
        schema["head"] = list(map(tuple, connection.execute(sa.select(AuditHead.__table__))))
        schema["revision"] = connection.scalar(sa.text(f"SELECT * FROM {REVISION_TABLE}"))
    engine.dispose()
    return schema


def test_migrations_end_at_the_revision_the_code_expects() -> None:
    assert ScriptDirectory.from_config(alembic("sqlite://")).get_heads() == [REVISION]


def test_created_and_migrated_databases_are_the_same(database_url: str) -> None:
    registry = Registry(database_url)
    registry.create()
    registry.close()
    created = schema_of(database_url)

    engine = open_engine(database_url)
    with engine.connect().execution_options(writing=True) as connection, connection.begin():
        Base.metadata.drop_all(connection)
        connection.execute(sa.text(f"DROP TABLE {REVISION_TABLE}"))
    engine.dispose()
    command.upgrade(alembic(database_url), "head")
    assert schema_of(database_url) == created


def test_a_migrated_database_is_what_the_models_describe(database_url: str) -> None:
    command.upgrade(alembic(database_url), "head")
    engine = open_engine(database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": REVISION_TABLE, "compare_type": True}
        )
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_a_migrated_database_is_served_and_goes_down_and_up_again(database_url: str) -> None:
    config = alembic(database_url)
    command.upgrade(config, "head")
    registry = Registry(database_url)
    registry.create()
    promote(registry)
    assert registry.verify() == []
    registry.close()

    command.downgrade(config, "base")
    engine = open_engine(database_url)
    with engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == [REVISION_TABLE]
    engine.dispose()

    registry = Registry(database_url)
    registry.create()
    assert registry.history() == []
    registry.close()

    command.downgrade(config, "base")
    command.upgrade(config, "head")
    registry.create()
    registry.close()


def test_a_database_of_the_first_schema_is_upgraded_and_keeps_its_rows(database_url: str) -> None:
    config = alembic(database_url)
    command.upgrade(config, "0001")
    execute(
        database_url,
        "INSERT INTO training_runs (id, trigger, policy, status, started_at)"
        " VALUES ('r0', 'd0', 'fine_tune', 'abandoned', 5)",
    )
    registry = Registry(database_url)
    with pytest.raises(SchemaMismatch, match="alembic"):
        registry.create()
    command.upgrade(config, "head")
    registry.create()
    registry.put_run(make_run())
    assert [(run.id, run.actor) for run in registry.runs()] == [("r1", "anna"), ("r0", None)]
    assert registry.verify() == []
    registry.close()
    command.downgrade(config, "0001")
    engine = open_engine(database_url)
    with engine.connect() as connection:
        columns = {c["name"] for c in sa.inspect(connection).get_columns("training_runs")}
        assert "actor" not in columns
        assert connection.scalar(sa.text("SELECT count(*) FROM training_runs")) == 2
    engine.dispose()


def test_alarms_of_the_second_schema_are_kept_and_their_inputs_come_and_go(
    database_url: str,
) -> None:
    config = alembic(database_url)
    command.upgrade(config, "0002")
    execute(
        database_url,
        "INSERT INTO degradations (id, bundle, target, detector, statistic, threshold, arl0,"
        " since_ts, ts, symbols, excess_loss, issued_at)"
        " VALUES ('d0', 'b1', 'volatility_30', 'cusum', 9, 8, 1000, 1, 2, '[]', 0.5, 3)",
    )
    registry = Registry(database_url)
    with pytest.raises(SchemaMismatch, match="alembic"):
        registry.create()
    command.upgrade(config, "head")
    registry.create()
    registry.add_degradation(make_degradation(inputs={"psi": {"volume": 0.5}}))
    found = {alarm.id: alarm.inputs for alarm in registry.degradations()}
    assert found == {"d0": None, "d1": {"psi": {"volume": 0.5}}}
    registry.close()
    command.downgrade(config, "0002")
    engine = open_engine(database_url)
    with engine.connect() as connection:
        columns = {c["name"] for c in sa.inspect(connection).get_columns("degradations")}
        assert "inputs" not in columns
        assert connection.scalar(sa.text("SELECT count(*) FROM degradations")) == 2
    engine.dispose()


def test_another_programs_tables_in_the_same_database_are_left_alone(database_url: str) -> None:
    execute(database_url, "CREATE TABLE alembic_version (version_num TEXT)")
    execute(database_url, "INSERT INTO alembic_version VALUES ('theirs')")
    registry = Registry(database_url)
    registry.create()
    promote(registry)
    assert registry.verify() == []
    registry.close()


def test_the_script_for_a_database_administrator_holds_every_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command.upgrade(alembic("postgresql://localhost/x"), "head", sql=True)
    script = capsys.readouterr().out
    assert all(f"CREATE TABLE {table}" in script for table in Base.metadata.tables)
