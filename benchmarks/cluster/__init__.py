"""A simulated cluster: routers on the same arrivals, under load, beside each other."""
