"""Calibration: every size answers the team's own prompts while it is idle; prompts, grading rules, and the run."""
