"""Operations: start, stop and check a system."""
