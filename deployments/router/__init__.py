"""Router: the actor that owns everything learned."""
