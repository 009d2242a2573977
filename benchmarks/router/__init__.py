"""Benchmarks of the router's own processor time."""
