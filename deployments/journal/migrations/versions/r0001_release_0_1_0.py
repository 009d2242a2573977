"""The tables of release 0.1.0. A journal of an earlier release has some of them, and gets what it lacks."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def tables() -> sa.MetaData:
    """The tables as release 0.1.0 created them."""
    schema = sa.MetaData()
    sa.Table(
        "events",
        schema,
        sa.Column("row", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("decision_id", sa.String(64), nullable=False, index=True),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("time_s", sa.Float(53), nullable=False),
    )
    sa.Table(
        "snapshots",
        schema,
        sa.Column("row", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("cut", sa.BigInteger, nullable=False),
        sa.Column("gone_before_s", sa.Float(53), nullable=False),
    )
    sa.Table(
        "replies",
        schema,
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("time_s", sa.Float(53), nullable=False, index=True),
    )
    sa.Table(
        "facts",
        schema,
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("value", sa.LargeBinary, nullable=False),
    )
    return schema


def upgrade() -> None:
    """Create the tables that are missing, and add missing columns; the rows get the present time."""
    schema = tables()
    schema.create_all(op.get_bind())
    inspector = sa.inspect(op.get_bind())
    defaults = {"time_s": str(time.time()), "cut": "0", "gone_before_s": "0"}
    for table in schema.sorted_tables:
        existing = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in existing:
                default = sa.text(defaults[column.name])
                added = sa.Column(
                    column.name, column.type, nullable=False, server_default=default
                )
                op.add_column(table.name, added)
