"""Journal: the durable record of all events."""
