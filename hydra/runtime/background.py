"""Checkpoints that are written while training goes on, from a copy: a little after every step."""

import copy
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.runtime.checkpoint import Checkpoint, save_in_pieces

if TYPE_CHECKING:
    from torch import Tensor


class BackgroundSaver:
    """Saves one checkpoint at a time, as `save_checkpoint` does, while the caller goes on.

    The caller writes, in pieces of its choice: a thread beside the step's own, however low its priority, takes several
    times as long from it as it computes (measured on two cores: 4.5 s for 1.4). Only the wait for the disk is a
    thread's. Copies of all tensors are made once, in ordinary memory (pinned where the tensors are on a GPU), and stay.
    """

    def __init__(self) -> None:
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._rest: Iterator[bool] = iter(())
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.step = 0
        """Of the save that came last."""

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
        """Copy the checkpoint and return; `advance` writes it. The save before is finished first.

        Raises:
            OSError: as `finish`.
        """
        self.finish()
        self.step = step
        self._rest = save_in_pieces(run_dir, step, self._copy(checkpoint), keep_last, keep_steps)

    def advance(self, seconds: float) -> None:
        """Write for about so long, a piece at least; nothing when all is written.

        Raises:
            OSError: as `finish`.
        """
        if self._thread is not None:
            if self._thread.is_alive():
                return
            self.finish()
        end = time.perf_counter() + seconds
        for is_wait in self._rest:
            if is_wait:
                thread = threading.Thread(target=self._wait_for_disk, name="checkpoint", daemon=True)
                thread.start()
                self._thread = thread
                return
            if time.perf_counter() >= end:
                return

    def finish(self) -> None:
        """Write what is left of the save under way, here and now; nothing if there is none.

        Raises:
            OSError: the system has refused it a call. The checkpoints that were there are there.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._error, error = None, self._error
        if error is not None:
            raise error
        for _ in self._rest:
            pass

    def _wait_for_disk(self) -> None:
        try:
            for _ in self._rest:
                pass
        except (OSError, MemoryError, RuntimeError) as error:  # `finish` raises it
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
        return Checkpoint(self._copies, copy.deepcopy(checkpoint.trainer_state))
