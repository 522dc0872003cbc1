"""`python -m hydra.runtime.die_with_parent SIGNAME PARENT_PID command...`: run a command that its parent's death ends.

Linux sends SIGNAME to the command when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG), however it ends,
SIGKILL included. The request survives execve(2), so the command needs to know nothing of it. A small program and not a
`preexec_fn`: the parent is a kernel with many threads, where running Python between fork and exec can deadlock.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Ask for the signal, make sure that the parent still lives, then become the command."""
    signal_name, parent_pid, *command = arguments
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.Signals[signal_name]) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent_pid):
        sys.exit(f"process {parent_pid} ended before its child began")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
