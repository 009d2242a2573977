"""The embedder and the three small models that the product ships, with the scripts that make them."""
