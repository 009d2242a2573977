"""Replays the policy on recorded answers of every size to the demo's questions."""
