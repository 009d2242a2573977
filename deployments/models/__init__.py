"""Models: one model size behind Ray Serve."""
