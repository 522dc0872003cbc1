"""Checkpoints off the step's path: written from a copy, by a thread that runs when nothing else wants to."""

import logging
import os
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.runtime.checkpoint import Checkpoint, saving

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class BackgroundSaver:
    """Saves one checkpoint at a time, as `save_checkpoint` does, while the caller goes on.

    Its copies of all tensors are made once, in ordinary memory (pinned where the tensors are on a GPU), and stay.
    """

    def __init__(self) -> None:
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._rest: Iterator[None] = iter(())
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._error: OSError | None = None

    @property
    def is_ready(self) -> bool:
        """Whether memory has been reserved."""
        return bool(self._copies)

    def reserve(self, checkpoint: Checkpoint) -> None:
        """Take the memory that copies of such checkpoints need, so that no save has to wait for it."""
        self._copy(checkpoint)

    def save(
        self, run_dir: Path, step: int, checkpoint: Checkpoint, keep_last: int, keep_steps: Collection[int] = ()
    ) -> None:
        """Copy the checkpoint and return; a thread writes it. The save before must be finished first.

        Raises:
            OSError: as `finish`.
        """
        self.finish()
        self._rest = saving(run_dir, step, self._copy(checkpoint), keep_last, keep_steps)
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Write what is left of the save under way, here and now; nothing if there is none.

        Raises:
            OSError: the system has refused it a call. The checkpoints that were there are there.
        """
        if self._thread is not None:
            self._hurry.set()
            self._thread.join()
            self._hurry.clear()
            self._thread = None
            self._error, error = None, self._error
            if error is not None:
                raise error
            for _ in self._rest:
                pass

    @property
    def is_writing(self) -> bool:
        """Whether the thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether the system has refused a call to the save under way; `finish` then raises it."""
        return self._error is not None

    def _write(self) -> None:
        # Of this thread alone. What it takes from a step it takes from all its threads, which wait for one another.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        try:
            for _ in self._rest:
                if self._hurry.is_set():
                    return  # whoever waits goes on, with a claim to the processor that this thread has not
        except OSError as error:
            self._error = error

    def _copy(self, checkpoint: Checkpoint) -> Checkpoint:
        import torch

        is_on_gpu = False
        for group, tensors in checkpoint.tensors.items():
            copies = self._copies.setdefault(group, {})
            for name, tensor in tensors.items():
                is_on_gpu |= tensor.is_cuda
                if name not in copies or (copies[name].shape, copies[name].dtype) != (tensor.shape, tensor.dtype):
                    copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copies[name].copy_(tensor, non_blocking=True)
            for name in copies.keys() - tensors.keys():
                del copies[name]
        if is_on_gpu:
            torch.cuda.synchronize()
        return Checkpoint(self._copies, checkpoint.trainer_state)
