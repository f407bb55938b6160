"""Training runs say who asked, why, on which champion, and what the choice of the policy rests on."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("training_runs") as runs:
        runs.add_column(sa.Column("actor", sa.Text))
        runs.add_column(sa.Column("reason", sa.Text))
        runs.add_column(sa.Column("ts", sa.BigInteger))
        runs.add_column(sa.Column("parent", sa.Text))
        runs.add_column(sa.Column("attempts", sa.BigInteger))
        runs.add_column(sa.Column("evidence", sa.JSON))


def downgrade() -> None:
    with op.batch_alter_table("training_runs") as runs:
        for name in ("evidence", "attempts", "parent", "ts", "reason", "actor"):
            runs.drop_column(name)
