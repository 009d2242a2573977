"""Profiling: features and forecasts of a request."""
