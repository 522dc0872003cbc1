"""SIGTERM, SIGINT and SIGHUP as a request that the trainer meets at its next step boundary."""

import signal
import socket
import threading
from collections.abc import Callable
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Whether this process was asked to end, and by which signal.

    Signals are read by a thread from a wake-up socket, so that they are seen at once even while the main thread is
    inside a long call of a compiled library, where Python runs no handlers.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.when_received: Callable[[str], None] | None = None

    @property
    def is_set(self) -> bool:
        """Whether the process was asked to end."""
        return self.signal_name is not None

    @classmethod
    def listening(cls) -> Self:
        """One that catches them from now on. Call it from the main thread of a process that is one's own.

        A closed terminal (SIGHUP) is a request like the others, unless nohup or a like has said that it is none.
        """
        stop = cls()
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        # The thread holds both ends: a socket that is collected would close the descriptor that signals write to.
        threading.Thread(target=stop._wait, args=(reader, writer), name="stop-request", daemon=True).start()
        return stop

    def _wait(self, reader: socket.socket, writer: socket.socket) -> None:
        while True:
            self.signal_name = signal.Signals(reader.recv(1)[0]).name
            if self.when_received is not None:
                self.when_received(self.signal_name)
