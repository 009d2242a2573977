"""Removes xgrammar's warnings from a process's stderr: `python log_filter.py` copies its input without them.

xgrammar has no setting for its warnings, and they quote the client's pattern or reference. A model's replica and its
engine inherit a stderr that leads here, and everything else that they write there passes. The module uses the standard
library only, so the process starts in 20 ms. It ends when the last of them has ended.
"""

import os
import re
import subprocess
import sys

# xgrammar puts the time and the line of its own code before its messages
WARNING = re.compile(rb"\[\d\d:\d\d:\d\d\] [^\s:]+:\d+: ")
LONGEST_LINE = 1_000_000


def filter_stderr() -> None:
    """Lead this process's stderr, and that of its later children, through the filter."""
    reader, writer = os.pipe()
    subprocess.Popen(
        [sys.executable, "-S", __file__],
        stdin=reader,
        stdout=2,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)


def main() -> None:
    """Copy line by line."""
    while line := sys.stdin.buffer.readline(LONGEST_LINE):
        found = WARNING.search(line)
        kept = line if found is None else line[: found.start()]
        if kept:
            os.write(1, kept)


if __name__ == "__main__":
    main()
