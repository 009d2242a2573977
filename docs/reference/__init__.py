"""Generates reference tables from the code, so that they cannot differ from it."""
