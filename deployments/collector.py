"""The garbage collector, made less eager where every request passes.

The records of thousands of decisions are kept, none of them in a cycle: reference counts free them. At its defaults
the collector searches them all over and over, for a third of the router's time.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

ALLOCATIONS = 20_000  # more new objects than freed ones, before the young are searched; Python's default is 700
ROUNDS = 20  # searches of one generation before the next older one is searched, too; Python's default is 10


def relax() -> None:
    """For this process from now on; what there is by now (modules, classes) is not searched again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(ALLOCATIONS, ROUNDS, ROUNDS)


@contextmanager
def paused() -> Iterator[None]:
    """Without the garbage collector, which would search a hundred thousand new records for cycles again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
