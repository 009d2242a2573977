"""What the product ships as data, with the scripts that made it: the embedder and three small models."""
