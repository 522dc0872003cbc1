"""A step of a run once more, with a look inside; a new run from a step of another; and whether a run is what it says.

All of it works on a copy of the run, with whatever the run was computed by, and leaves the run as it is.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hydra.errors import ConfigError, HydraError, NotFiniteError, RunError, SpikeError
from hydra.runtime import Run, paths
from hydra.runtime.checkpoint import (
    check_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    step_of,
)
from hydra.runtime.copies import copied
from hydra.runtime.random_state import RandomState
from hydra.runtime.records import keep_records
from hydra.runtime.sums import find_altered_files
from scripts.config import ALWAYS_CHANGEABLE, CHANGEABLE, TrainingConfig
from scripts.evaluation import as_written
from scripts.launch import launch
from scripts.trainer import StepResult, Trainer

PARENT = "parent.json"
RECORDS = (paths.METRICS, paths.SAMPLES, paths.SKIPPED)


@dataclass(frozen=True)
class ModuleRecord:
    """What a module gave in a step: root mean squares, the largest over its micro-batches; NaN where not finite."""

    name: str
    output_rms: float
    gradient_rms: float
    """Of the gradient of its output; 0.0 where none came."""


@dataclass(frozen=True)
class Replay:
    """One step, computed once more."""

    step: int
    """Number of the step, the first being 1."""
    rows: list[int]
    """Rows of the train stream that its batch is made of."""
    loss_nats: float
    grad_norm: float
    skipped: str | None
    """Why the optimizers were not stepped, if they were not."""
    recorded: Mapping[str, object] | None
    """The line of metrics.jsonl about the step, if it was logged."""
    first_not_finite: str | None
    """The first module whose output, or else the gradient of whose output, is not finite."""
    modules: list[ModuleRecord]

    @property
    def is_as_recorded(self) -> bool | None:
        """Whether loss and gradient norm are bit for bit those of metrics.jsonl; None if they do not stand there."""
        if self.recorded is None or "loss_nats" not in self.recorded:
            return None
        return (self.recorded["loss_nats"], self.recorded["grad_norm"]) == (self.loss_nats, self.grad_norm)

    def describe(self) -> str:
        """What a person wants to know: what went wrong first, or what every module gave."""
        lines = [
            f"step {self.step}: loss {self.loss_nats:.6g} nats, gradient norm {self.grad_norm:.6g}, "
            f"rows {self.rows} of the train stream"
        ]
        if self.skipped:
            lines.append(f"not taken: {self.skipped}")
        if self.is_as_recorded is not None:
            lines.append("bit for bit as recorded" if self.is_as_recorded else f"recorded was {self.recorded}")
        if self.first_not_finite:
            lines.append(f"first not finite: {self.first_not_finite}")
        lines += [f"{'module':<44} {'output rms':>12} {'gradient rms':>12}"]
        lines += [
            f"{record.name:<44} {record.output_rms:>12.4g} {record.gradient_rms:>12.4g}" for record in self.modules
        ]
        return "\n".join(lines)


def replay(run: Run, step: int, *, trust_code: bool = False) -> Replay:
    """Compute step number `step` (from 1) of the run once more, from the nearest checkpoint before it.

    First with the blocks as they are written and a look at every module, without moving anything; then as the run does
    it, bit for bit where processor, torch, source and number of processes (one) are those of the run.

    Args:
        trust_code: run the code that the run holds in `code/`, with which whoever wrote it can do what you can.

    Raises:
        RunError: the run has no such step, or holds code that is not trusted, or `run` is none.
        HydraError: as a trainer raises it: the shards are not there, the memory does not suffice, ...
    """
    _check_step(run, step, 1, trust_code)
    with copied(run, before=step) as copy, _at_step(run, copy, step - 1) as trainer:
        rows, batch, generators = trainer.next_rows(), trainer.next_batch(), RandomState.now()
        probe = Probe(trainer.model)
        with as_written(trainer.model), probe.watching():
            loss_nats = trainer.forward_backward(batch)
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        generators.restore()
        try:
            result = trainer.train_step()
        except (NotFiniteError, SpikeError) as error:  # the step at which the run ended
            result = StepResult(loss_nats, math.nan, math.nan, str(error))
    recorded = [record for record in run.metrics() if record["step"] == step and "learning_rate" in record]
    return Replay(
        step=step,
        rows=rows,
        loss_nats=result.loss_nats,
        grad_norm=result.grad_norm,
        skipped=result.skipped,
        recorded=recorded[0] if recorded else None,
        first_not_finite=probe.first_not_finite(),
        modules=probe.records(),
    )


def fork(run: Run, step: int, run_dir: str | Path | None = None, *, trust_code: bool = False, **changes: object) -> Run:
    """Start a new run that goes on from `step` finished steps of `run` as that did, but for `changes` of its config.

    Args:
        run_dir: the new run; left out, a name beside the old one. Its parent is recorded in parent.json.
        trust_code: run the code that the run holds in `code/`, with which whoever wrote it can do what you can.
        changes: fields that a run may change (scripts.config.CHANGEABLE).

    Raises:
        ConfigError: a field that may not be changed, or a value that it may not have.
        RunError: the run has no such step, or holds code that is not trusted, or there is something in run_dir.
    """
    _check_step(run, step, 0, trust_code)
    config = _config_of(run, step + 1)
    fields = {field.name for field in dataclasses.fields(config)}
    if fixed := sorted(changes.keys() & fields - CHANGEABLE - ALWAYS_CHANGEABLE):
        raise ConfigError(
            f"a fork goes on with its parent's weights, data and optimizer, so that {', '.join(fixed)} must stay; "
            f"start a new run for that, or change what may be changed: {', '.join(sorted(CHANGEABLE))}"
        )
    stored = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    preset = stored.pop("preset_name")
    allowed = {"allow_changes": tuple({*config.allow_changes, *changes})} if changes else {}
    forked = TrainingConfig.preset(preset, **{**stored, **changes, **allowed})
    if forked.max_steps < step:
        raise ConfigError(f"max_steps must be at least the {step} steps that were taken, but got {forked.max_steps}")
    target = paths.next_free(run.directory) if run_dir is None else paths.resolve_run_dir(run_dir)
    if target.exists():
        raise RunError(f"a fork needs a folder of its own, but there is {target}; give another run_dir")
    with copied(run, before=step + 1) as copy:
        if step > _newest_step(copy):
            with _at_step(run, copy, step) as trainer:
                if step > _newest_step(copy):
                    save_checkpoint(copy, step, trainer.checkpoint(), keep_last=1)
        _drop_later(copy, run, step)
        paths.write_atomically(copy / paths.CONFIG, config.to_json())
        parent = {"run": run.name, "step": step, "config": json.loads(config.to_json())}
        paths.write_json(copy / PARENT, parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside it and renamed: a part of it would look like a run.
        with tempfile.TemporaryDirectory(prefix=".fork-", dir=target.parent) as folder:
            shutil.copytree(copy, Path(folder) / target.name)
            os.rename(Path(folder) / target.name, target)
        paths.sync_directory(target.parent)
    return launch(forked, target)


def _check_step(run: Run, step: int, first: int, trust_code: bool) -> None:
    """Return if `run` has the step and may be computed again; RunError if not."""
    if not isinstance(run, Run):
        raise RunError(f"run must be a run, such as Run.open('runs/first'), but got {run!r}")
    _check_code(run, trust_code)
    max_steps = _read_config(run).max_steps
    if not isinstance(step, int) or not first <= step <= max_steps:
        raise RunError(f"step must be a whole number from {first} to {max_steps} for run {run.name}, but got {step!r}")


def _check_code(run: Run, trust_code: bool) -> None:
    if (files := _read_config(run).attention_code) and not trust_code:
        raise RunError(
            f"to compute steps of {run.name} is to run code that it holds, {run.directory / paths.CODE} "
            f"({', '.join(sorted(files))}); read it, and if you trust who wrote it, give trust_code=True "
            "(verify_run: --trust-code)"
        )


def _read_config(run: Run) -> TrainingConfig:
    return TrainingConfig.from_json((run.directory / paths.CONFIG).read_text())


def _read_changes(run: Run) -> list[dict[str, Any]]:
    return list(paths.read_json(run.directory / paths.ENVIRONMENT).get("changes", []))


def _newest_state(run: Run) -> Mapping[str, Any]:
    """What the newest readable checkpoint says beside its tensors, which are not looked at; {} if there is none."""
    for directory in reversed(list_checkpoints(run.directory)):
        with contextlib.suppress(HydraError):
            return load_checkpoint(directory, groups=()).trainer_state
    return {}


def _newest_step(run_dir: Path) -> int:
    return max((step_of(directory) for directory in list_checkpoints(run_dir)), default=0)


def _config_of(run: Run, step: int) -> TrainingConfig:
    """The config that step number `step` (from 1) was computed with, or will be."""
    fields = json.loads(_read_config(run).to_json())
    state = _newest_state(run)
    if step <= state.get("step", 0):
        # config.json may have been changed since, with no step taken yet.
        fields = json.loads(state["config"])
    for change in reversed(_read_changes(run)):
        if change["step"] >= step:
            fields.update({name: before for name, (before, _) in change["fields"].items() if name != "n_ranks"})
    return TrainingConfig.from_json(json.dumps(fields))


@contextlib.contextmanager
def _at_step(run: Run, copy: Path, step: int) -> Iterator[Trainer]:
    """A trainer that has finished `step` steps in `copy` as the run did, with the config of the one after them."""
    start = _newest_step(copy)
    for change in sorted({change["step"] for change in _read_changes(run)}):
        if start < change <= step:
            with _trainer(copy, _config_of(run, change)).at_step(change) as trainer:
                save_checkpoint(copy, change, trainer.checkpoint(), keep_last=1)
    with _trainer(copy, _config_of(run, step + 1)).at_step(step) as trainer:
        yield trainer


def _trainer(copy: Path, config: TrainingConfig) -> Trainer:
    paths.write_atomically(copy / paths.CONFIG, config.to_json())
    return Trainer(config, copy)


@dataclass(frozen=True)
class Verification:
    """What was looked at of a run, and what is not as it should be."""

    problems: list[str]
    computed: list[range]
    """Numbers of the steps that were computed again."""

    def describe(self) -> str:
        """One line for the end."""
        steps = ", ".join(f"{numbers[0]} to {numbers[-1]}" for numbers in self.computed)
        if self.problems:
            return f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)}; computed again: {steps or 'no step'}"
        return f"every file is as it was written; computed again, bit for bit as recorded: {steps or 'no step'}"


def verify(run: Run, n_steps: int = 20, *, trust_code: bool = False) -> Verification:
    """Look at a finished run: is it what it was?

    Every file is compared with what was taken down when the run was done. Then `n_steps` steps are computed again from
    the start and from every checkpoint that is kept: losses and gradient norms must be bit for bit those of
    metrics.jsonl, and weights and optimizer those of the next checkpoint, where the steps come to it. Steps that more
    than one process computed are left out, since one alone gives them to rounding only.

    Args:
        trust_code: run the code that the run holds in `code/`, with which whoever wrote it can do what you can.

    Raises:
        RunError: the run holds code that is not trusted, or n_steps is no whole number above 0.
        HydraError: every file is as it was, but steps cannot be computed again: the shards are not there, ...
    """
    if not isinstance(n_steps, int) or n_steps < 1:
        raise RunError(f"steps to compute again must be a whole number of at least 1, but got {n_steps!r}")
    problems, computed, starts = list(find_altered_files(run.directory)), [], [0]
    for directory in list_checkpoints(run.directory):
        try:
            check_checkpoint(directory)
            starts.append(step_of(directory))
        except HydraError as error:
            problems.append(str(error))
    try:
        _check_code(run, trust_code)
        for numbers, found in _compute_again(run, starts, n_steps):
            computed.append(numbers)
            problems += found
    except HydraError as error:
        if not problems:
            raise
        problems.append(str(error))
    return Verification(problems, computed)


def _compute_again(run: Run, starts: list[int], n_steps: int) -> Iterator[tuple[range, list[str]]]:
    """Numbers of at most n_steps steps after each of `starts`, and in what they differ from what the run kept.

    `starts` are 0 and the steps of checkpoints that are whole.
    """
    recorded = {record["step"]: record for record in run.metrics() if "grad_norm" in record}
    newest = _newest_step(run.directory)
    ends = [newest, *(change["step"] for change in _read_changes(run))]
    for start in starts:
        if start == newest or _n_ranks_of(run, start + 1) > 1:
            continue
        stop = min([start + n_steps, *(end for end in ends if end > start)])
        problems: list[str] = []
        with copied(run, before=start + 1) as copy, _at_step(run, copy, start) as trainer:
            while trainer.step < stop:
                result = trainer.take_step()
                there = recorded.get(trainer.step)
                if there and (there["loss_nats"], there["grad_norm"]) != (result.loss_nats, result.grad_norm):
                    problems.append(
                        f"step {trainer.step}: loss and gradient norm are {result.loss_nats!r} and "
                        f"{result.grad_norm!r}, but recorded are {there['loss_nats']!r} and {there['grad_norm']!r}"
                    )
                if trainer.step in starts[1:]:
                    problems += _differences(trainer, run, trainer.step)
        yield range(start + 1, stop + 1), problems


def _n_ranks_of(run: Run, step: int) -> int:
    """How many processes computed step number `step`, of those up to the newest checkpoint."""
    for change in _read_changes(run):
        if change["step"] >= step and "n_ranks" in change["fields"]:
            return int(change["fields"]["n_ranks"][0])
    return int(_newest_state(run).get("n_ranks", 1))


def _differences(trainer: Trainer, run: Run, step: int) -> Iterator[str]:
    directory = next(path for path in list_checkpoints(run.directory) if step_of(path) == step)
    computed = trainer.checkpoint().tensors
    stored = load_checkpoint(directory, groups=tuple(computed)).tensors
    for group, tensors in computed.items():
        for name, tensor in tensors.items():
            if name not in stored[group] or not torch.equal(tensor.cpu(), stored[group][name]):
                yield f"{directory.name}: {group} {name} is not what computing the steps before it again gives"


def _drop_later(copy: Path, run: Run, step: int) -> None:
    """Keep of a copy what the run held after `step` steps, with the records of them."""
    for directory in list_checkpoints(copy):
        if step_of(directory) != step:
            shutil.rmtree(directory)
    for name in RECORDS:
        if (run.directory / name).is_file():
            shutil.copy2(run.directory / name, copy / name)
            keep_records(copy / name, lambda number: number <= step)
    for name in (paths.STATE, paths.LOCK, paths.LOG):
        (copy / name).unlink(missing_ok=True)
    shutil.rmtree(copy / paths.EVENTS, ignore_errors=True)


class Probe:
    """Looks at what every module of a model gives and what gradient comes back, in the order in which they do."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._output_rms: dict[str, float] = {}
        self._gradient_rms: dict[str, float] = {}
        self._first_output: str | None = None
        self._first_gradient: str | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within it forward and backward passes are looked at."""
        handles = [
            module.register_forward_hook(lambda _module, _inputs, output, name=name: self._see(name, output))
            for name, module in self._model.named_modules()
            if name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def first_not_finite(self) -> str | None:
        """`<module>: its output`, or if all outputs are finite `<module>: the gradient of its output`."""
        if self._first_output is not None:
            return f"{self._first_output}: its output"
        return f"{self._first_gradient}: the gradient of its output" if self._first_gradient is not None else None

    def records(self) -> list[ModuleRecord]:
        """In the order in which modules were done."""
        return [ModuleRecord(name, rms, self._gradient_rms.get(name, 0.0)) for name, rms in self._output_rms.items()]

    def _see(self, name: str, output: object) -> None:
        tensors = [tensor for tensor in _tensors(output) if tensor.is_floating_point()]
        rms = _rms(tensors)
        self._output_rms[name] = _worse(rms, self._output_rms.get(name, 0.0))
        if self._first_output is None and not math.isfinite(rms):
            self._first_output = name
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._see_gradient(name, gradient))

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        rms = _rms([gradient])
        self._gradient_rms[name] = _worse(rms, self._gradient_rms.get(name, 0.0))
        if self._first_gradient is None and not math.isfinite(rms):
            self._first_gradient = name


def _worse(one: float, other: float) -> float:
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _rms(tensors: list[Tensor]) -> float:
    """Root mean square over all numbers; NaN if one is not finite, 0.0 of nothing."""
    squares = sum(float(tensor.detach().double().square().sum()) for tensor in tensors)
    n = sum(tensor.numel() for tensor in tensors)
    if n == 0:
        return 0.0
    return math.sqrt(squares / n) if math.isfinite(squares) else math.nan
