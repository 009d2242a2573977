"""Benchmarks of the serving path, under load."""
