"""Thompson sampling on a hierarchical Bayesian linear model."""
