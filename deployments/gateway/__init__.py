"""Gateway: the HTTP interface."""
