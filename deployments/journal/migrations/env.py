"""Runs the migrations on the connection that tables.py has opened. Alembic executes this file."""

from alembic import context

# SQLite and PostgreSQL both roll back changes of tables
context.configure(
    connection=context.config.attributes["connection"], transactional_ddl=True
)
with context.begin_transaction():
    context.run_migrations()
