"""Grammars that clients ask for: how large they may be, and a compilation that ends."""
