"""Dispatch: from a profiled request to an answering model."""
