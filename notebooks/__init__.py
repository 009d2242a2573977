"""Looking at what was learned: the log, its numbers, its figures, and the report."""
