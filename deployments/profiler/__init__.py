"""Profiler: from a text to a task profile."""
