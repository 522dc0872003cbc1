"""SIGTERM, Ctrl-C and a closed terminal, each turned into one exception that lets the engine finish its work."""

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """The job was asked to end. A KeyboardInterrupt, since asyncio lets nothing else through to its caller."""


class Interruption:
    """While entered (in the main thread), the first signal raises `Interrupted`; later ones are only noted.

    After `disarm` every signal is only noted: what the engine does then is bounded in time and must not be cut short.
    """

    def __init__(self) -> None:
        """Nothing is caught before it is entered."""
        self._armed = True
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        """Catch the signals, in the main thread (no other can)."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # Who started papermill with nohup or in the background has chosen that the signal is ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back to whom they belonged."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def disarm(self) -> None:
        """From now on signals interrupt nothing."""
        self._armed = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        logger.warning("%s noted: saving what there is", name)
        if not self._armed:
            return
        self._armed = False
        raise Interrupted(f"the job was ended by {name}")
