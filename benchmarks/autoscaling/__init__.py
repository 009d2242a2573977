"""Rules for the number of replicas in the simulated cluster: Ray Serve's own, wake-up requests, the router's demand."""
