"""One file for each change of the tables. Each only adds tables, nullable columns and columns with a default."""
