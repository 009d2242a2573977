"""Tracking: experiments and policy versions in MLflow."""
