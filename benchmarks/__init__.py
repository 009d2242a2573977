"""Benchmarks, each repeatable by one command."""
