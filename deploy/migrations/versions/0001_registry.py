"""First schema: bundles, training runs, performance windows, degradations, lifecycle audit."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "bundles",
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("uri", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("parent", sa.Text),
        sa.Column("data_from_ts", sa.BigInteger, nullable=False),
        sa.Column("data_to_ts", sa.BigInteger, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("code_version", sa.Text, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("version", name="pk_bundles"),
    )
    op.create_index("ix_bundles_created_at", "bundles", ["created_at"])
    op.create_table(
        "training_runs",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("trigger", sa.Text, nullable=False),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("finished_at", sa.BigInteger),
        sa.Column("bars", sa.BigInteger),
        sa.Column("seconds", sa.Double),
        sa.Column("bundle", sa.Text),
        sa.Column("error", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_training_runs"),
    )
    op.create_index("ix_training_runs_started_at", "training_runs", ["started_at"])
    op.create_table(
        "performance_windows",
        sa.Column("bundle", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("from_ts", sa.BigInteger, nullable=False),
        sa.Column("to_ts", sa.BigInteger, nullable=False),
        sa.Column("n", sa.BigInteger, nullable=False),
        sa.Column("mean_loss", sa.Double, nullable=False),
        sa.Column("mean_reference_loss", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint(
            "bundle", "role", "target", "from_ts", "to_ts", name="pk_performance_windows"
        ),
    )
    op.create_table(
        "degradations",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("bundle", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("detector", sa.Text, nullable=False),
        sa.Column("statistic", sa.Double, nullable=False),
        sa.Column("threshold", sa.Double, nullable=False),
        sa.Column("arl0", sa.Double, nullable=False),
        sa.Column("since_ts", sa.BigInteger, nullable=False),
        sa.Column("ts", sa.BigInteger, nullable=False),
        sa.Column("symbols", sa.JSON, nullable=False),
        sa.Column("excess_loss", sa.Double, nullable=False),
        sa.Column("issued_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_degradations"),
    )
    op.create_index("ix_degradations_ts", "degradations", ["ts"])
    op.create_table(
        "lifecycle_audit",
        sa.Column("seq", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("slot", sa.Text, nullable=False),
        sa.Column("from_bundle", sa.Text),
        sa.Column("to_bundle", sa.Text),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("evidence", sa.JSON, nullable=False),
        sa.Column("previous", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_lifecycle_audit"),
        sa.UniqueConstraint("key", name="uq_lifecycle_audit_key"),
    )
    op.create_index("ix_lifecycle_audit_slot", "lifecycle_audit", ["slot"])
    head = op.create_table(
        "lifecycle_audit_head",
        sa.Column("id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("hash", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_lifecycle_audit_head"),
    )
    op.bulk_insert(head, [{"id": 0, "seq": 0, "hash": "0" * 64}])


def downgrade() -> None:
    for table in (
        "lifecycle_audit_head",
        "lifecycle_audit",
        "degradations",
        "performance_windows",
        "training_runs",
        "bundles",
    ):
        op.drop_table(table)
