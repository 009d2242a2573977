"""Compiles the inner loops by numba.

Numba compiles a function when its module is imported, for the types that are written there, so no request waits for the
compiler. The machine code is kept in numba's cache on disk, or in memory if no folder is writable.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(signature: str, **options: Any) -> Callable[[F], F]:
    """Compile a function for arguments of these types at once; numba's own types say nothing to mypy."""

    def compile_(function: F) -> F:
        try:
            compiler = njit(signature, cache=True, error_model="numpy", **options)
            made: F = compiler(function)
        except (RuntimeError, OSError):
            # No folder for the cache is writable, or the disk is full.
            made = njit(signature, error_model="numpy", **options)(function)
        return made

    return compile_
