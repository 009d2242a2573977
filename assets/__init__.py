"""The embedder and the small models, with the scripts that make them."""
