"""No engine outlives its replica: `python orphans.py PID GROUP` waits for PID to end, then ends its process group.

vLLM's engine and workers are processes of their own. A replica that is killed (by the kernel for memory, by Serve for
its health) cannot end them, and they keep their memory, and the GPU. So the replica makes a process group of its own,
which they inherit, and leaves this small process outside of it. Standard library only: it starts in 20 ms.
"""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

GRACE_S = 3.0  # what gets SIGTERM may remove its shared memory


def guard() -> None:
    """From here on, all that this process starts ends with it, however it ends."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    command = [sys.executable, "-S", __file__, str(os.getpid()), str(os.getpgrp())]
    subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def main(pid: int, group: int) -> None:
    """Wait for the end of `pid`, and end what is left of `group`."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:  # it has ended already
        pass
    else:
        if os.getppid() == pid:  # or the number went to another process
            select.select([descriptor], [], [])
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        ends = time.monotonic() + GRACE_S
        while time.monotonic() < ends:
            os.killpg(group, 0)  # raises when nobody is left
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
