"""The registry database: one row class per table. All times are epoch milliseconds UTC.

A change here is a new migration under `deploy/migrations`, and `REVISION` names the newest.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

REVISION = "0003"
REVISION_TABLE = "registry_revision"
"""Alembic's, under a name of ours: the database may be shared with other programs."""


class Base(MappedAsDataclass, DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        }
    )
    # JSON, not JSONB: it comes back as it was written, which the audit's hashes are made of.
    type_annotation_map = {  # noqa: RUF012
        int: BigInteger,
        float: Double,
        str: Text,
        dict[str, Any]: JSON,
    }


class BundleRow(Base, kw_only=True):
    """A bundle that was written to the store, once; the bundle itself is the truth."""

    __tablename__ = "bundles"

    version: Mapped[str] = mapped_column(primary_key=True)
    uri: Mapped[str]
    sha256: Mapped[str]
    parent: Mapped[str | None] = mapped_column(default=None)
    data_from_ts: Mapped[int]
    data_to_ts: Mapped[int]
    seed: Mapped[int]
    code_version: Mapped[str]
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[int] = mapped_column(index=True)


class RunRow(Base, kw_only=True):
    """One training run as it stands (`schemas.messages.TrainingRun`).

    `trigger` is alarm, schedule or command; rows of the first schema hold a degradation's id there,
    and NULL in the columns that came with the second.
    """

    __tablename__ = "training_runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    trigger: Mapped[str]
    policy: Mapped[str]
    status: Mapped[str] = mapped_column(default="running")
    """requested, running, succeeded, failed, skipped; abandoned in rows of the first schema."""
    started_at: Mapped[int] = mapped_column(index=True)
    finished_at: Mapped[int | None] = mapped_column(default=None)
    bars: Mapped[int | None] = mapped_column(default=None)
    seconds: Mapped[float | None] = mapped_column(default=None)
    bundle: Mapped[str | None] = mapped_column(default=None)
    error: Mapped[str | None] = mapped_column(default=None)
    actor: Mapped[str | None] = mapped_column(default=None)
    reason: Mapped[str | None] = mapped_column(default=None)
    ts: Mapped[int | None] = mapped_column(default=None)
    parent: Mapped[str | None] = mapped_column(default=None)
    attempts: Mapped[int | None] = mapped_column(default=None)
    evidence: Mapped[dict[str, Any] | None] = mapped_column(default=None)


class WindowRow(Base, kw_only=True):
    """Losses of one bundle over the outcomes with from_ts <= ts < to_ts (event time)."""

    __tablename__ = "performance_windows"

    bundle: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    target: Mapped[str] = mapped_column(primary_key=True)
    from_ts: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    to_ts: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    n: Mapped[int]
    mean_loss: Mapped[float]
    mean_reference_loss: Mapped[float]


class DegradationRow(Base, kw_only=True):
    """A degradation event as it was published."""

    __tablename__ = "degradations"

    id: Mapped[str] = mapped_column(primary_key=True)
    bundle: Mapped[str]
    target: Mapped[str]
    detector: Mapped[str]
    statistic: Mapped[float]
    threshold: Mapped[float]
    arl0: Mapped[float]
    since_ts: Mapped[int]
    ts: Mapped[int] = mapped_column(index=True)
    symbols: Mapped[list[str]] = mapped_column(JSON)
    excess_loss: Mapped[float]
    issued_at: Mapped[int]
    inputs: Mapped[dict[str, Any] | None] = mapped_column(default=None)
    """`schemas.messages.InputDrift`; None where it was not measured."""


class AuditRow(Base, kw_only=True):
    """Who put which bundle into which slot, when and why. Only ever appended.

    Alarms and training runs have rows too: their `slot` is `alarm` or `training`.
    `hash` covers all other columns and `previous` is the hash of the row before, so a row that
    was changed, removed or moved breaks the chain (`Registry.verify`).
    """

    __tablename__ = "lifecycle_audit"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    key: Mapped[str] = mapped_column(unique=True)
    """The writer's name for this entry: an append that is tried again stays one row."""
    at: Mapped[int]
    actor: Mapped[str]
    slot: Mapped[str] = mapped_column(index=True)
    from_bundle: Mapped[str | None]
    to_bundle: Mapped[str | None]
    reason: Mapped[str]
    evidence: Mapped[dict[str, Any]]
    previous: Mapped[str]
    hash: Mapped[str]


class AuditHead(Base, kw_only=True):
    """One row: the newest link of the audit. Appends queue up on its lock; it also shows a cut tail."""

    __tablename__ = "lifecycle_audit_head"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    seq: Mapped[int]
    hash: Mapped[str]


revision_table = Table(
    REVISION_TABLE,
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name=f"{REVISION_TABLE}_pkc"),
)
