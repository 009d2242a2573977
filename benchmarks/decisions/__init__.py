"""Benchmarks of the quality of decisions, on recorded streams."""
