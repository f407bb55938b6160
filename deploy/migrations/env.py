"""Runs the registry's migrations on the workers' own DATABASE_URL, or on `-x url=...`."""

from alembic import context

from schemas.tables import REVISION_TABLE, Base
from workers.config import Settings
from workers.store import open_engine

url = context.get_x_argument(as_dictionary=True).get("url") or Settings().database_url
engine = open_engine(url)
options = {
    "target_metadata": Base.metadata,
    "version_table": REVISION_TABLE,
    "render_as_batch": engine.dialect.name == "sqlite",
}

if context.is_offline_mode():
    context.configure(dialect_name=engine.dialect.name, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with engine.connect().execution_options(writing=True) as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()
