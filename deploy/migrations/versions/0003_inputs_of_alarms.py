"""Degradations say how far the inputs were from those that the bundle was made of."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    with op.batch_alter_table("degradations") as degradations:
        degradations.add_column(sa.Column("inputs", sa.JSON))


def downgrade() -> None:
    with op.batch_alter_table("degradations") as degradations:
        degradations.drop_column("inputs")
