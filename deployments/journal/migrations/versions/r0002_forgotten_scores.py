"""The table of the marks of forgotten scores, which release 0.1.0 does not read.

Before that release was followed by another, marks were events of a kind of their own. They are moved.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table, and move the marks that are among the events."""
    op.create_table(
        "forgotten",
        sa.Column("row", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("time_s", sa.Float(53), nullable=False),
    )
    # marks belong to no decision, and there is an index of decisions
    marks = "FROM events WHERE decision_id = '' AND kind = 'forgotten'"
    op.execute(f'INSERT INTO forgotten SELECT "row", body, time_s {marks}')
    op.execute(f"DELETE {marks}")
