"""Comparison of this tree with the last release."""
