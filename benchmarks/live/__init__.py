"""Recorded load on the running system, and the simulator's error there."""
