"""The demonstration `router demo`: a stream of tasks through `auto`, each fixed size and the static rules."""
