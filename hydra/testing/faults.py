"""Faults that have names: what a machine or a run may do to a trainer, done to one that a test started.

    python -m hydra.testing.faults FAULTS.json scripts.trainer RUN_DIR

FAULTS.json holds a list of `{"fault": NAME, ARGUMENT: ...}`. Each puts itself in place of functions of the product, in
this process alone; then the module's `main` runs. Nothing in the product knows of faults, and no variable or flag
reaches it. Steps are counted from 1, as they are in metrics.jsonl.
"""

import builtins
import errno
import fnmatch
import functools
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from hydra.model.framework.model import ModelOutput

KILLED = 137
"""Exit status of a process that ends itself without another word, as if by SIGKILL."""
WRITING = "wxa+"


@dataclass
class Place:
    """Where training stands: the step that is being computed, and its forward passes so far."""

    step: int = 0
    n_passes: int = 0


# -------------------------------------------------------------------- numbers


def bad_loss(step: int, factor: float = 1.0, added: float = 0.0, micro_batch: int | None = None) -> None:
    """The loss of step `step`, or of one of its micro-batches (from 0), becomes loss x factor + added.

    What is added has no gradient: NaN added leaves a finite one.
    """

    def change(place: Place, model: object, output: "ModelOutput") -> "ModelOutput":
        if place.step != step or micro_batch not in (None, place.n_passes - 1):
            return output
        return output._replace(losses={name: loss * factor + added for name, loss in output.losses.items()})

    _after_passes(change)


def bad_gradient(step: int, value: float) -> None:
    """One element of the gradient of step `step` becomes `value`; the loss knows nothing of it."""
    import torch

    place, clip = _follow_steps(), torch.nn.utils.clip_grad_norm_

    def changed(parameters: Any, *args: Any, **named: Any) -> "Tensor":
        parameters = list(parameters)
        if place.step == step:
            parameters[-1].grad.view(-1)[0] = value
        return clip(parameters, *args, **named)

    torch.nn.utils.clip_grad_norm_ = changed


def bad_weight(
    step: int, value: float, name: str = "", index: int = 0, times: int = 1, *, in_evaluation: bool = False
) -> None:
    """Element `index` of a parameter (the last, or that called `name`) becomes `value` in step `step`, or in the
    evaluation after it. That is memory that was damaged: after so many `times` the step finds it whole.
    """
    import torch

    left = times

    @torch.no_grad()
    def change(place: Place, model: Any) -> None:
        nonlocal left
        if place.step == step and left > 0 and model.training is not in_evaluation and place.n_passes <= 1:
            left -= 1
            parameters = dict(model.named_parameters())
            parameters[name or list(parameters)[-1]].view(-1)[index] = value

    _before_passes(change, in_evaluation=True)


def noise() -> None:
    """Every training loss is multiplied by what Python's, numpy's and torch's generators draw, as dropout would do."""

    def change(place: Place, model: object, output: "ModelOutput") -> "ModelOutput":
        import numpy as np
        import torch

        drawn = random.gauss(0.0, 1.0) + float(np.random.normal()) + float(torch.rand(()))
        return output._replace(losses={name: loss * (1.0 + 0.01 * drawn) for name, loss in output.losses.items()})

    _after_passes(change)


# -------------------------------------------------------------------- memory


def no_memory(
    step: int,
    place: Literal["forward", "optimizer", "evaluation"],
    kind: Literal["Python", "CPU", "GPU"] = "GPU",
    times: int = 1,
    micro_batch: int = 0,
    rank: int = 0,
) -> None:
    """Memory is refused `times` times at step `step`: to its forward passes from that of `micro_batch` on, after its
    optimizers have moved the weights, or to the evaluation after it; as Python's allocator refuses it, or torch's for
    the CPU or the GPU; of several processes to that with this rank.
    """
    left = times if int(os.environ.get("RANK", "0")) == rank else 0
    at = _follow_steps()

    def refuse() -> None:
        import torch

        nonlocal left
        if left == 0 or at.step != step:
            return
        left -= 1
        if kind == "Python":
            raise MemoryError
        if kind == "CPU":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 bytes")

    if place == "optimizer":
        _after_optimizers(refuse)
        return

    def before(passes: Place, model: Any) -> None:
        if place == "evaluation" and not model.training:
            refuse()
        if place == "forward" and model.training and passes.n_passes > micro_batch:
            refuse()

    _before_passes(before, in_evaluation=True)


# -------------------------------------------------------------------- the disk


def crash_in_save(save: int, call: int) -> None:
    """End the process before file-system call `call` (from 1) of the `save`-th checkpoint that it writes."""
    _at_call_of_save(save, call, lambda: os._exit(KILLED))


def full_disk_in_save(save: int, call: int) -> None:
    """File-system call `call` (from 1) of the `save`-th checkpoint fails, and each write of that save after it."""

    _at_call_of_save(save, call, _refuse_write)


def full_disk(pattern: str, step: int, last_step: int | None = None) -> None:
    """From step `step` on, until `last_step` is done, files with names of the pattern (fnmatch's) take half of what is
    written to them, and then the disk is full.
    """
    place, real_open = _follow_steps(), io.open

    def opened(file: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
        real = real_open(file, mode, *args, **named)
        is_named = isinstance(file, str | bytes | os.PathLike)
        if not is_named or not set(mode) & set(WRITING) or not fnmatch.fnmatch(Path(os.fsdecode(file)).name, pattern):
            return real
        n_halves = 0

        def before(name: str) -> None:
            nonlocal n_halves
            n_halves += 1
            if n_halves % 2 == 0 and step <= place.step and (last_step is None or place.step <= last_step):
                n_halves = 0
                _refuse_write()

        return _TornFile(real, before)

    builtins.open = io.open = opened


def file_size_limit(n_bytes: int, step: int = 0) -> None:
    """The system refuses to let any file of this process grow beyond `n_bytes`, as a full disk does, from the start of
    step `step` on.
    """

    def limit(place: Place) -> None:
        if place.step >= step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))

    limit(Place())
    if step > 0:
        _follow_steps(limit)


def small_disk(n_bytes: int) -> None:
    """The disk is said to have `n_bytes` left."""
    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=n_bytes)


# -------------------------------------------------------------------- the process and its clock


def kill(step: int) -> None:
    """SIGKILL at the start of step `step`."""

    def end(place: Place) -> None:
        if place.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    _follow_steps(end)


def clock_jump(step: int, seconds: float) -> None:
    """From step `step` on the clock of the wall shows `seconds` more (or less); the monotonic one goes on."""
    place, clock = _follow_steps(), time.time
    time.time = lambda: clock() + (seconds if place.step >= step else 0.0)


FAULTS: dict[str, Callable[..., None]] = {
    fault.__name__: fault
    for fault in (
        bad_loss,
        bad_gradient,
        bad_weight,
        noise,
        no_memory,
        crash_in_save,
        full_disk_in_save,
        full_disk,
        file_size_limit,
        small_disk,
        kill,
        clock_jump,
    )
}


# -------------------------------------------------------------------- where they are put in


def _refuse_write() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _follow_steps(call: Callable[[Place], None] = lambda place: None) -> Place:
    """A place that follows the trainer's steps; `call` gets it at the start of each."""
    from hydra.data.loader import Dataset

    place, train_batch = Place(), Dataset.train_batch

    @functools.wraps(train_batch)
    def followed(self: Dataset, step: int, **named: int) -> Any:
        place.step, place.n_passes = step + 1, 0
        call(place)
        return train_batch(self, step, **named)

    Dataset.train_batch = followed  # type: ignore[method-assign]
    return place


def _before_passes(call: Callable[[Place, Any], None], *, in_evaluation: bool = False) -> None:
    from hydra.model.framework.model import HydraModel

    place, forward = _follow_steps(), HydraModel.forward

    @functools.wraps(forward)
    def changed(self: HydraModel, *args: Any, **named: Any) -> "ModelOutput":
        place.n_passes += self.training
        if self.training or in_evaluation:
            call(place, self)
        return forward(self, *args, **named)

    HydraModel.forward = changed  # type: ignore[method-assign]


def _after_passes(call: Callable[[Place, object, "ModelOutput"], "ModelOutput"]) -> None:
    """Change what the model returns in training."""
    from hydra.model.framework.model import HydraModel

    place, forward = _follow_steps(), HydraModel.forward

    @functools.wraps(forward)
    def changed(self: HydraModel, *args: Any, **named: Any) -> "ModelOutput":
        output = forward(self, *args, **named)
        if not self.training:
            return output
        place.n_passes += 1
        return call(place, self, output)

    HydraModel.forward = changed  # type: ignore[method-assign]


def _after_optimizers(call: Callable[[], None]) -> None:
    import hydra.optim as optim

    build = optim.build_optimizers

    def stepped(real: Callable[[], None]) -> None:
        real()
        call()

    @functools.wraps(build)
    def built(*args: Any, **named: Any) -> Any:
        optimizers = build(*args, **named)
        for optimizer in optimizers:
            vars(optimizer)["step"] = functools.partial(stepped, optimizer.step)
        return optimizers

    optim.build_optimizers = built


def _at_call_of_save(save: int, call: int, do: Callable[[], None]) -> None:
    """Do it before call `call` of the `save`-th checkpoint, and from there on before each write of that one."""
    from hydra.runtime import checkpoint

    n_saves, n_calls = 0, 0
    saver: int | None = None  # the thread that is at a piece of that save

    def before(name: str) -> None:
        nonlocal n_calls
        # The ledger's heartbeat and TensorBoard write from threads of their own, a trainer while its save goes on.
        if threading.get_ident() != saver:
            return
        n_calls += 1
        if n_calls == call or (n_calls > call and name == "write"):
            do()

    real = checkpoint.save_in_pieces

    @functools.wraps(real)
    def counted(*args: Any, **named: Any) -> Iterator[bool]:
        nonlocal n_saves, n_calls, saver
        n_saves += 1
        is_the_one, n_calls = n_saves == save, 0
        pieces = real(*args, **named)
        while True:
            saver = threading.get_ident() if is_the_one else None
            try:
                is_wait = next(pieces, None)
            finally:
                saver = None
            if is_wait is None:
                return
            yield is_wait

    checkpoint.save_in_pieces = counted
    _count_calls(before)


def _count_calls(before: Callable[[str], None]) -> None:
    """Call `before` with its name before each call that changes the file system: a write is two, of half each."""
    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "chmod"):
        setattr(os, name, _counted(name, getattr(os, name), before))

    real_open = io.open

    def counted_open(file: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
        if not set(mode) & set(WRITING):
            return real_open(file, mode, *args, **named)
        before("open")
        return _TornFile(real_open(file, mode, *args, **named), before)

    builtins.open = io.open = counted_open


def _counted(name: str, real: Callable[..., Any], before: Callable[[str], None]) -> Callable[..., Any]:
    @functools.wraps(real)
    def counted(*args: Any, **named: Any) -> Any:
        before(name)
        return real(*args, **named)

    return counted


class _TornFile:
    """A file opened for writing, whose writes can be cut in the middle."""

    def __init__(self, file: Any, before: Callable[[str], None]) -> None:
        self._file = file
        self._before = before

    def write(self, content: Any) -> int:
        half = len(content) // 2
        self._before("write")
        written: int = self._file.write(content[:half])
        self._file.flush()
        self._before("write")
        return written + int(self._file.write(content[half:]))

    def __enter__(self) -> "_TornFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


# -------------------------------------------------------------------- the launcher


def install(faults: list[dict[str, Any]]) -> None:
    """Put each of `faults` in place, in this process, for good."""
    for fault in faults:
        arguments = dict(fault)
        FAULTS[arguments.pop("fault")](**arguments)


def main(arguments: list[str]) -> int:
    """`FAULTS.json MODULE ARGUMENT ...`: run the module's `main` under the faults; returns its exit status."""
    faults, module, *rest = arguments
    install(json.loads(Path(faults).read_text()))
    status: int = importlib.import_module(module).main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
