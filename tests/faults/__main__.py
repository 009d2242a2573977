"""The command `python -m tests.faults`."""

from tests.faults.catalogue import main

main()
