"""Evaluation: simulation, replay and off-policy estimates."""
