"""Rollout: roles, the promotion gate and the regression watch."""
