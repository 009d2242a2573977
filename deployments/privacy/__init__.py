"""Privacy: erases and exports what is stored of an API key, or of a client's user."""
