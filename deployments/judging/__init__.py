"""Grading by the judge, and second answers to be graded."""
