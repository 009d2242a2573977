"""Feedback: scores, their sources and their reputation."""
