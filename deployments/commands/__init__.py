"""The command `router`: one file for each noun; main.py puts them together."""
