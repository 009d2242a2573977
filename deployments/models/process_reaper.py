"""Kills the processes of a replica that has ended: `python process_reaper.py PID GROUP` waits for the end of PID, and
then ends its process group.

vLLM's engine and workers are processes of their own. A replica that is killed (by the kernel for memory, by Serve for
its health) cannot end them, and they would keep their memory and the GPU. So the replica makes a process group, which
its children inherit, and starts this small process outside of the group. The module uses the standard library only, so
the process starts in 20 ms.
"""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

GRACE_S = 3.0  # between SIGTERM and SIGKILL, to remove shared memory


def kill_children_on_exit() -> None:
    """Make sure that this process's children are killed when it exits, even by SIGKILL."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    command = [sys.executable, "-S", __file__, str(os.getpid()), str(os.getpgrp())]
    subprocess.Popen(
        command,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def main(pid: int, group: int) -> None:
    """Wait for the end of the process `pid`, and end the other processes of `group`."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:  # the process has ended already
        pass
    else:
        # if it is no longer the parent, it has ended, and another process may have its id
        if os.getppid() == pid:
            select.select([descriptor], [], [])
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline:
            os.killpg(group, 0)  # raises when the group is empty
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
