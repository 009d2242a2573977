"""Whole numbers in the heads of files, which begin with their highest or with their lowest byte."""


def big(data: bytes) -> int:
    """The number whose highest byte comes first."""
    return int.from_bytes(data, "big")


def little(data: bytes) -> int:
    """The number whose lowest byte comes first."""
    return int.from_bytes(data, "little")
