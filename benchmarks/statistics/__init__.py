"""Benchmarks of the statistics: calibration and off-policy estimates."""
