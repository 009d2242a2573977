"""Migrations of the journal's tables with Alembic; tables.py runs those that a database lacks."""
