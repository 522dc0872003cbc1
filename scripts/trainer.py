"""The one trainer. `python -m scripts.trainer RUN_DIR` trains what config.json in there says, or goes on with it.

Read it from the top: `Trainer.train` is the whole run, `train_step` one optimizer step, `forward_backward` its
gradient. `launch` starts it as a process of its own. Shapes: B rows, T tokens.

Exit status: 0 done, 1 failed, 2 bad config, 75 cut off and resumable.
"""

if __name__ == "__main__":
    # Importing torch takes a second or more, in which a request to stop must be heard too.
    from hydra.runtime.signals import StopRequest

    asked_to_stop = StopRequest.listening()

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import nn

from hydra.attention.code import load_copies
from hydra.attention.core import check_kernel
from hydra.data import Batch, Dataset
from hydra.errors import ConfigError, DiskFullError, HydraError, NotFiniteError, OutOfMemoryError, SpikeError
from hydra.model.framework import HydraModel, build_model
from hydra.optim import (
    MasterWeights,
    build_optimizers,
    build_schedule,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from hydra.runtime import Run, paths, workspace_root
from hydra.runtime.background import BackgroundSaver
from hydra.runtime.checkpoint import (
    Checkpoint,
    has_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
)
from hydra.runtime.choices import Choices, choose_once, give_back_freed_memory, set_up_torch, settle
from hydra.runtime.copies import copied
from hydra.runtime.disk import is_disk_full, raising_disk_full, require_room
from hydra.runtime.environment import record_changes
from hydra.runtime.guard import SpikeGuard
from hydra.runtime.ledger import Ledger, Status
from hydra.runtime.logs import log_to_standard_error, logging_to
from hydra.runtime.memory import MemoryPlan
from hydra.runtime.memory.exhaustion import give_back_memory, is_out_of_memory
from hydra.runtime.memory.host import read_peak_bytes, reset_peak
from hydra.runtime.random_state import RandomState, seed_all
from hydra.runtime.ranks import Ranks
from hydra.runtime.records import MetricsWriter, keep_records, read_records
from hydra.runtime.signals import StopRequest
from hydra.runtime.source import keep_source
from hydra.runtime.sums import has_sums, remove_sums, write_sums
from hydra.runtime.tracking import check_installed
from scripts.config import TrainingConfig
from scripts.evaluation import as_written, evaluate, write_sample
from scripts.launch import launch, write_config_once
from scripts.preparation import check_own_classes, execution_of, find_changes, open_data, settle_memory
from scripts.recovery import StartOverError, advise_on_spike, cause_and_message, half_of, require_finite_weights

__all__ = ["RunResult", "StepResult", "Trainer", "launch"]

logger = logging.getLogger(__name__)
T = TypeVar("T")
COMPILE_CACHE = "compiled"  # under data_dir, shared by runs
MAX_ROLLBACKS = 3
BACKGROUND_SHARE = 0.01
"""Of a step's time, that goes into a checkpoint which is written in the background."""
EXIT_DONE, EXIT_FAILED, EXIT_BAD_CONFIG, EXIT_RESUMABLE = 0, 1, 2, 75


@dataclass(frozen=True)
class RunResult:
    """How a call of `Trainer.train` ended; the figures are those of the last evaluation on the validation text."""

    run_dir: Path
    status: Status
    step: int
    val_loss_nats: float | None
    val_bits_per_byte: float | None


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss in nats per token, L2 norm of the gradient before clipping, AdamW's rate."""

    loss_nats: float
    grad_norm: float
    learning_rate: float
    skipped: str | None = None
    """Why the optimizers were not stepped, if they were not."""


class Trainer:
    """Trains the model of `config` in `run_dir`, from the start or from the newest checkpoint there."""

    model: HydraModel
    masters: MasterWeights
    optimizers: list[torch.optim.Optimizer]
    plan: MemoryPlan
    choices: Choices
    micro_batch_size: int  # rows of one forward and backward pass
    dataset: Dataset
    metrics: MetricsWriter

    def __init__(
        self,
        config: TrainingConfig,
        run_dir: str | Path,
        stop: StopRequest | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
    ) -> None:
        """`stop` asks for an early end with a checkpoint; left out, only the last step ends the run."""
        self.config = config
        self.run_dir = paths.resolve_run_dir(run_dir)
        self.stop = stop or StopRequest()
        self.ranks = ranks
        self.wandb_mode = config.wandb_mode
        self._ranks_stop = False  # as all ranks agreed in the last step
        self.step = 0  # finished optimizer steps
        self.tokens = 0  # tokens that were trained on
        self.guard = SpikeGuard(config.spike_deviations)
        self.rollbacks = 0  # of this session
        self.background: BackgroundSaver | None = None
        self._step_at_last_log = 0
        self._time_at_last_log = time.perf_counter()

    # ---------------------------------------------------------------- the run

    @raising_disk_full()
    def train(self) -> RunResult:
        """Train to `max_steps`, or to a stop request.

        Raises:
            RunError: the directory holds another config, or has an owner.
            ConfigError: W&B is asked for and not installed.
            HydraError: as the ledger then says: bad data, a damaged checkpoint, a loss that is not finite.
        """
        check_installed(self.config.wandb_mode)
        write_config_once(self.config, self.run_dir)
        self.ledger = Ledger.open(self.run_dir, waits_for_room=self.config.when_disk_is_full == "go_on")
        try:
            with logging_to(self.run_dir / paths.LOG), ExitStack() as self._closing:
                self._refuse_other_run()
                state = self.ledger.state
                is_left = state.status != "done" or not self.config.is_met_by(state.step) or self._has_lost_steps
                if self.ranks.is_any(is_left):
                    self._train_as_owner()
            if self.ledger.state.status == "done" and (is_left or not has_sums(self.run_dir)):
                write_sums(self.run_dir)
        finally:
            self.ledger.close()
        state = self.ledger.state
        return RunResult(self.run_dir, state.status, state.step, state.val_loss_nats, state.val_bits_per_byte)

    @contextlib.contextmanager
    def at_step(self, step: int) -> Iterator[Self]:
        """Within it `step` steps are finished, from the newest checkpoint on, and nothing of them is written.

        For whoever looks at a step again, in a copy of a run.
        """
        write_config_once(self.config, self.run_dir)
        self.wandb_mode = "disabled"
        self.ledger = Ledger.open(self.run_dir)
        try:
            with ExitStack() as self._closing:
                self._refuse_other_run()
                self.ledger.begin(self.config.max_steps)
                self._prepare()
                self._compile_if_due()
                while self.step < step:
                    self.take_step()
                yield self
        finally:
            self.ledger.close()

    def assist(self) -> None:
        """Compute a share of every step's gradient until the owner's run ends; for ranks but the first, in a copy."""
        with self.at_step(0):
            self.ranks.wait_for_all()
            while self.step < self.config.max_steps and not self.is_stopping:
                self.take_step()

    def _train_as_owner(self) -> None:
        self.ledger.begin(self.config.max_steps)
        remove_sums(self.run_dir)  # of a run that goes on after it was done
        try:
            self._train_to_the_end()
        except KeyboardInterrupt:
            self._finish_save()
            self.ledger.finish("interrupted", stage="stopped", cause="KeyboardInterrupt", message="ended by its caller")
            raise
        except BaseException as error:
            cause, message = cause_and_message(error)
            self._finish_save()  # before the last word, after which others may take the run
            self.ledger.finish("failed", stage=self.ledger.state.stage, cause=cause, message=message)
            raise

    @raising_disk_full()
    def _train_to_the_end(self) -> None:
        keep_source(self.run_dir)
        self.stop.when_received = self._abandon_preparation
        if self.stop.signal_name:
            self._abandon_preparation(self.stop.signal_name)
        self._prepare()
        self.stop.when_received = None
        self.ranks.wait_for_all()  # what others need of the run is there
        self.ranks.wait_for_all()  # and they are ready
        # What preparing took is not what training takes.
        reset_peak()

        while True:
            try:
                self._take_steps()
                break
            except StartOverError as error:
                self._start_over(error)
        self._finish()

    def _take_steps(self) -> None:
        self._compile_if_due()
        self._evaluate_if_due()
        while self.step < self.config.max_steps and not self.is_stopping:
            began = time.perf_counter()
            result = self.take_step()
            self._go_on_saving(BACKGROUND_SHARE * (time.perf_counter() - began))
            self._log_if_due(result)
            self._evaluate_if_due()
            self._checkpoint_if_due()

    @property
    def is_stopping(self) -> bool:
        """Whether no more steps are to be taken; of several ranks none may leave before the others."""
        return self.stop.is_set if self.ranks.count == 1 else self._ranks_stop

    def take_step(self) -> StepResult:
        """One step of the run, as `train_step`, and the compiler if it is due after it."""
        result = self.train_step()
        self._compile_if_due()
        return result

    def train_step(self) -> StepResult:
        """One optimizer step on the global batch of `self.step`; what the guard finds is not stepped with.

        Raises:
            NotFiniteError, SpikeError: the guard found one step more than the run may skip; nothing has moved.
        """
        batch = self.next_batch()
        loss_nats = self._within_memory(lambda: self.forward_backward(batch))
        result = self.update_weights(loss_nats)

        self.step += 1
        self.tokens += batch.n_valid_tokens
        self.ledger.update(
            stage="training",
            step=self.step,
            tokens=self.tokens,
            train_flops=self.tokens * self.flops_per_token,
            skipped_steps=len(self.guard.skipped_steps),
        )
        return result

    def next_batch(self) -> Batch:
        """The global batch of the step after `self.step`."""
        return self.dataset.train_batch(self.step, **self._batch_shape)

    def next_rows(self) -> list[int]:
        """The rows of the train stream that it is made of."""
        return self.dataset.train_rows(self.step, **self._batch_shape)

    @property
    def _batch_shape(self) -> dict[str, int]:
        config = self.config
        return {"seed": config.seed, "n_rows": config.batch_size, "n_tokens": config.context_length}

    def forward_backward(self, batch: Batch) -> float:
        """Accumulate the gradient of the mean loss over all valid tokens of the batch; returns that mean in nats.

        Each micro-batch contributes its sum divided by the whole batch's tokens, so how the batch is cut changes
        rounding and nothing else. Memory that is refused to one of several ranks is refused to all.
        """
        if self.ranks.count == 1:
            return self._own_gradient(batch)
        try:
            loss_nats, refusal = self._own_gradient(batch), None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            loss_nats, refusal = 0.0, str(error)
        return self._add_up_ranks(loss_nats, refusal)

    def _own_gradient(self, batch: Batch) -> float:
        """Of this process's rows of the batch."""
        loss_nats, own = 0.0, self.ranks.rows_of(len(batch.inputs_BT))
        for start in range(own.start, own.stop, self.micro_batch_size):
            rows = batch.slice_rows(start, min(start + self.micro_batch_size, own.stop))
            output = self.model(*self._to_device(rows))
            loss = torch.stack(list(output.losses.values())).sum() / batch.n_valid_tokens
            loss.backward()
            loss_nats += float(loss.detach())
        return loss_nats

    def _add_up_ranks(self, loss_nats: float, refusal: str | None) -> float:
        """Loss and gradients over all ranks, which also agree here on whether this is the last step."""
        said = torch.tensor([loss_nats, self.stop.is_set, refusal is not None], dtype=torch.float64)
        self.ranks.add_up([said])
        if said[2]:
            raise MemoryError(refusal or "to another process")
        self.ranks.add_up(master.grad for master in self.masters.named.values() if master.grad is not None)
        self._ranks_stop = bool(said[1])
        return float(said[0])

    def update_weights(self, loss_nats: float) -> StepResult:
        """Clip the gradient, step every optimizer with it unless the guard finds something, and drop it."""
        grad_norm = float(nn.utils.clip_grad_norm_(self.masters.named.values(), self.config.max_gradient_norm))
        share_of_peak = self._schedule(self.step)
        skipped = self.guard.finds(loss_nats, grad_norm)
        if skipped is None:
            self.guard.remember(loss_nats, grad_norm)
            try:
                for optimizer in self.optimizers:
                    set_learning_rate(optimizer, share_of_peak)
                    optimizer.step()
                self.masters.publish()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                # Some weights have moved and some have not.
                raise StartOverError(f"memory was refused to the optimizer: {error}", needs_memory=True) from None
        else:
            self._note_skipped_step(skipped, is_finite=math.isfinite(loss_nats) and math.isfinite(grad_norm))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return StepResult(loss_nats, grad_norm, share_of_peak * self.config.learning_rate, skipped)

    def _note_skipped_step(self, reason: str, *, is_finite: bool) -> None:
        """Log it with what it was computed from, unless it is one too many."""
        config, number = self.config, self.step + 1
        rows = self.next_rows()
        if not is_finite:
            self._require_finite_weights()
        if not self.guard.may_skip(number, config.max_skipped_steps):
            message = (
                f"loss and gradient norm must be finite and not far beyond what is usual, but in step {number} "
                f"{reason} (rows {rows} of the train stream), and {len(self.guard.skipped_steps)} steps were skipped "
                f"before; the weights have not moved. {advise_on_spike(config, self.guard.has_taken_any)}"
            )
            raise SpikeError(message) if is_finite else NotFiniteError(message)
        self.guard.skipped_steps.append(number)
        logger.warning("step %d is skipped: %s; it was computed from rows %s of the train stream", number, reason, rows)
        self.metrics.append(self.run_dir / paths.SKIPPED, {"step": number, "reason": reason, "rows": rows})

    # ---------------------------------------------------------------- once in a while

    def _log_if_due(self, result: StepResult) -> None:
        if self.step % self.config.log_every and self.step != self.config.max_steps:
            return
        now = time.perf_counter()
        n_steps = self.step - self._step_at_last_log
        step_s = (now - self._time_at_last_log) / n_steps
        self._time_at_last_log, self._step_at_last_log = now, self.step
        self.metrics.write(
            {
                "step": self.step,
                "tokens": self.tokens,
                **({} if result.skipped else {"loss_nats": result.loss_nats, "grad_norm": result.grad_norm}),
                "learning_rate": result.learning_rate,
                "skipped_steps": len(self.guard.skipped_steps),
                "tokens_per_s": self.config.batch_size * self.config.context_length / step_s,
                "step_ms": 1000.0 * step_s,
                "peak_mem_mib": self._peak_memory_mib(),
                "elapsed_s": self.ledger.train_s,
            }
        )

    def _compile_if_due(self) -> None:
        """From the step that the config names on, whatever session comes to it, blocks run as compiled code."""
        compile_from = self.config.compile_from_step
        if compile_from is not None and self.step >= compile_from and not self.model.is_compiled:
            torch.use_deterministic_algorithms(True)  # once more, now for the compiler
            self.model.compile_regions()

    def _evaluate_if_due(self) -> None:
        """Evaluate and sample at the due steps; a run that was cut off before this was written does it on resume."""
        is_due = self.step > 0 and (self.step % self.config.eval_every == 0 or self.step == self.config.max_steps)
        if not is_due or self.step in self._val_loss_nats:
            return
        began = time.perf_counter()
        self.ledger.update(stage="evaluating")
        self.model.eval()
        with as_written(self.model):
            try:
                figures = self._within_memory(
                    lambda: evaluate(
                        self.model,
                        self.dataset,
                        self.device,
                        n_rows=self.micro_batch_size,
                        n_tokens=self.config.context_length,
                        is_stopped=lambda: self.is_stopping,
                    )
                )
            except NotFiniteError:
                self._require_finite_weights()
                raise
            if figures is None:
                return
            text = write_sample(self.model, self.dataset, self.config) if self.config.sample_tokens else None
        if text is not None:
            sample = {"step": self.step, "prompt": self.config.sample_prompt, "text": text}
            self.metrics.append(self.run_dir / paths.SAMPLES, sample)
        self.metrics.write({"step": self.step, "tokens": self.tokens, **figures, "elapsed_s": self.ledger.train_s})
        self._val_loss_nats[self.step] = figures["val_loss_nats"]
        self.ledger.update(stage="training", **figures)
        self.model.train()
        self._time_at_last_log += time.perf_counter() - began

    def _go_on_saving(self, seconds: float) -> None:
        background = self.background
        if background is None:
            return
        if not background.is_ready:
            # After its first step a session has all that a checkpoint holds, and the peak of memory still before it.
            self._within_memory(lambda: background.reserve(self.checkpoint()))
        self._save(lambda: background.advance(seconds), background.step)

    def _checkpoint_if_due(self) -> None:
        is_last = self.step == self.config.max_steps
        best = self._best_step()
        is_best = self.config.keep_best and self.step == best
        is_due = self.step % self.config.checkpoint_every == 0 or is_last or is_best or self.is_stopping
        if not is_due or has_checkpoint(self.run_dir, self.step):
            return
        began = time.perf_counter()
        self.ledger.update(stage="writing a checkpoint")
        self._require_finite_weights()
        background = self.background
        if background is not None:
            self._save(background.finish, background.step)  # of the one before; whatever becomes of it, this is due
        save = background.save if background else save_checkpoint
        kept = [best] if self.config.keep_best and best is not None else []

        def write() -> None:
            self.metrics.sync()
            save(self.run_dir, self.step, self.checkpoint(), self.config.keep_checkpoints, kept)
            if background and (is_last or self.is_stopping):
                background.finish()

        self._save(write, self.step, must_succeed=is_last or self.is_stopping)
        self.ledger.update(stage="training")
        self._time_at_last_log += time.perf_counter() - began

    def _save(self, write: Callable[[], None], step: int, *, must_succeed: bool = False) -> None:
        """Write (on at) the checkpoint of `step`; a full disk is met as the config says.

        Raises:
            DiskFullError: it ends the run.
        """
        try:
            write()
        except OSError as error:
            if not is_disk_full(error):
                raise
            problem = f"a checkpoint of step {step} must be written, but the disk is full ({error})"
            if self.config.when_disk_is_full == "stop" or must_succeed:
                raise DiskFullError(f"{problem}; make room and give the same command again") from None
            logger.warning("%s; going on without it", problem)

    def _finish_save(self) -> None:
        """What is under way when a session ends early is still worth having."""
        if self.background is None:
            return
        try:
            self.background.finish()
        except OSError as error:
            step = self.background.step
            logger.warning("the checkpoint of step %d is lost (%s); the run goes on from the one before", step, error)

    def checkpoint(self) -> Checkpoint:
        """Everything that the next step depends on."""
        tensors = {
            "model": self.masters.state_dict(),
            "optimizer": optimizer_tensors(self.masters.named, self.optimizers),
            "rng": RandomState.now().to_tensors(),
        }
        trainer_state = {
            "step": self.step,
            "tokens": self.tokens,
            "n_ranks": self.ranks.count,
            "best_step": self._best_step(),
            "guard": self.guard.state(),
            "config": self.config.to_json(),
            "data_fingerprint": self.dataset.manifest["fingerprint"],
            "model_spec": self.config.model_spec(self._vocab_size).to_dict(),
        }
        return Checkpoint(tensors, trainer_state)

    def _best_step(self) -> int | None:
        """The step with the lowest validation loss so far, the first of several; None before there is one."""
        return min(self._val_loss_nats, key=lambda step: (self._val_loss_nats[step], step), default=None)

    # ---------------------------------------------------------------- when something is refused or goes wrong

    def _within_memory(self, work: Callable[[], T]) -> T:
        """work(), again with half the rows at a time as long as memory is refused to it; nothing else changes.

        Raises:
            OutOfMemoryError: memory is refused to a single row.
        """
        while True:
            generators = RandomState.now()
            try:
                return work()
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                refusal = str(error)
            # Only here, when the error is gone and with it the frames that hold the activations.
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            self._halve_micro_batch(refusal)
            generators.restore()

    def _halve_micro_batch(self, refusal: str) -> None:
        fitting = half_of(self.micro_batch_size, self.config.batch_size, refusal)
        give_back_memory()
        logger.warning(
            "memory was refused (%s); micro_batch_size %d becomes %d", refusal, self.micro_batch_size, fitting
        )
        self.micro_batch_size = fitting
        self.choices = settle(
            self.run_dir,
            self.choices,
            micro_batch_size=fitting,
            activation_checkpointing=self.choices.activation_checkpointing,
            optimizer_offload=self.choices.optimizer_offload,
        )

    def _require_finite_weights(self) -> None:
        require_finite_weights(self.model, self.masters.state_dict(), self.step)

    def _start_over(self, error: StartOverError) -> None:
        """Build everything anew and go on from the newest checkpoint, or from the start: bounded, and logged.

        Raises:
            NotFiniteError, OutOfMemoryError: it has happened too often in this session.
        """
        problem = str(error)
        self.rollbacks += 1
        if self.rollbacks > MAX_ROLLBACKS or self.ranks.count > 1:
            kind = OutOfMemoryError if error.needs_memory else NotFiniteError
            raise kind(f"{problem}, {self.rollbacks} times in this session; see {self.run_dir / paths.LOG}")
        logger.warning("%s; going back to the newest checkpoint", problem)
        self._closing.close()
        del self.model, self.masters, self.optimizers
        give_back_memory()
        seed_all(self.config.seed)
        if error.needs_memory:
            self._halve_micro_batch(problem)
        self._build(newest_whole(self.run_dir, sets_aside=True))

    # ---------------------------------------------------------------- before the first step, and after the last

    def _prepare(self) -> None:
        choices = choose_once(self.run_dir, **self.config.asked_choices())
        set_up_torch(choices, self.config.seed, workspace_root() / self.config.data_dir / COMPILE_CACHE)
        self.device = torch.device(choices.device)
        if self.config.adam_state == "8bit":
            torch.use_deterministic_algorithms(
                True
            )  # for the compiler: that optimizer's step is compiled from the start

        load_copies(self.config.attention_code, self.run_dir / paths.CODE)
        if self.config.attention_code:
            self.ledger.update(stage="checking attention classes")
        check_own_classes(self.config, self.run_dir)
        self.ledger.update(stage="preparing data")
        self.dataset = open_data(self.config, self.run_dir, self._newest)
        self._vocab_size = int(self.dataset.manifest["tokenizer"]["vocab_size"])

        give_back_freed_memory()
        self.ledger.update(stage="planning memory")
        self.plan, self.choices = settle_memory(self.config, self.run_dir, choices, self._vocab_size)
        require_room(self.run_dir, self.plan.checkpoint_bytes)
        self._build(self._newest)

    def _build(self, newest: Path | None) -> None:
        """The model and its optimizers as the newest checkpoint has them, or as they are before the first step."""
        self.ledger.update(stage="building the model")
        spec = self.config.model_spec(self._vocab_size)
        model = build_model(spec, seed=self.config.seed, device=self.device, execution=execution_of(self.choices))
        self.assemble(model, self.choices)
        for block in self.model.typed_blocks():
            dtype = block.attention_norm.weight.dtype
            check_kernel(self.choices.attention_kernel, self.choices.device, dtype, block.attention.score_width)
        self.step = self.tokens = 0
        self.guard = SpikeGuard(self.config.spike_deviations)
        if self.config.checkpoints_in_background:
            self.background = BackgroundSaver()
            self._closing.callback(self._finish_save)
        if newest is not None:
            self._resume(newest)
        changes = find_changes(self.config, self.run_dir, newest, self.ranks.count)
        record_changes(self.run_dir, self.step, changes)

        self.metrics = self._closing.enter_context(
            MetricsWriter(
                self.run_dir,
                self.step,
                self.wandb_mode,
                self.config.wandb_project,
                waits_for_room=self.config.when_disk_is_full == "go_on",
            )
        )
        evaluations = [record for record in read_records(self.run_dir / paths.METRICS) if "val_loss_nats" in record]
        self._val_loss_nats = {record["step"]: record["val_loss_nats"] for record in evaluations}
        # An evaluation is finished by its metrics; a sample without them is written again.
        keep_records(self.run_dir / paths.SAMPLES, self._val_loss_nats.__contains__)
        keep_records(self.run_dir / paths.SKIPPED, self.guard.skipped_steps.__contains__)
        last = evaluations[-1] if evaluations else {}
        self.ledger.update(
            step=self.step,
            tokens=self.tokens,
            n_parameters=self.model.n_parameters(),
            train_flops=self.tokens * self.flops_per_token,
            val_loss_nats=last.get("val_loss_nats"),
            val_bits_per_byte=last.get("val_bits_per_byte"),
        )
        self._step_at_last_log, self._time_at_last_log = self.step, time.perf_counter()
        self.model.train()

    def assemble(self, model: HydraModel, choices: Choices) -> None:
        """Take the freshly initialised float32 `model` to train, and make what updates its weights."""
        self.model = model
        self.micro_batch_size = choices.micro_batch_size
        dtype = getattr(torch, choices.dtype)
        self.masters = MasterWeights(model, dtype, model.lookup_names(), on_host=choices.optimizer_offload)
        # What a GPU multiplies fast a host may multiply very slowly, so that Muon's products are in float32 there.
        muon_dtype = torch.float32 if choices.optimizer_offload else dtype
        self.optimizers = build_optimizers(self.masters.named, self.config.optimizer_spec(), muon_dtype)
        self.flops_per_token = model.flops_per_token(self.config.context_length)
        self._schedule = build_schedule(
            self.config.schedule,
            max_steps=self.config.max_steps,
            warmup_steps=self.config.warmup_steps,
            decay_fraction=self.config.decay_fraction,
            final_fraction=self.config.final_learning_rate_fraction,
        )

    def _refuse_other_run(self) -> None:
        """Where config.json has been changed since the newest checkpoint, that must be allowed."""
        before = list_checkpoints(self.run_dir)
        self._newest = newest_whole(self.run_dir, sets_aside=True)
        # Of a run that is done: it is computed again up to its end. One whose checkpoints were all taken away stays.
        self._has_lost_steps = before[-1:] != ([self._newest] if self._newest else [])
        find_changes(self.config, self.run_dir, self._newest, self.ranks.count)

    def _resume(self, directory: Path) -> None:
        """Put weights, optimizer, generator and counters back as they were when the checkpoint was written."""
        # One after the other: weights and optimizer need not be there twice at the same time.
        checkpoint = load_checkpoint(directory, groups=("model", "rng"))
        state = checkpoint.trainer_state
        assert state["data_fingerprint"] == self.dataset.manifest["fingerprint"], state
        self.masters.load_state_dict(dict(checkpoint.tensors["model"]))
        RandomState.from_tensors(checkpoint.tensors["rng"]).restore()
        del checkpoint
        optimizer = load_checkpoint(directory, groups=("optimizer",))
        load_optimizer_tensors(self.masters.named, self.optimizers, optimizer.tensors["optimizer"])
        self.step, self.tokens = int(state["step"]), int(state["tokens"])
        if "guard" in state:  # checkpoints of before have none
            self.guard.load_state(state["guard"])
        logger.info("going on from %s", directory)

    def _finish(self) -> None:
        self._checkpoint_if_due()
        if self.step == self.config.max_steps and self.step in self._val_loss_nats:
            self.ledger.finish("done", stage="done")
        else:
            signal_name = self.stop.signal_name
            message = f"stopped by {signal_name} after step {self.step}; its checkpoint is written"
            self.ledger.finish("interrupted", stage="stopped", cause=signal_name, message=message)
        logger.info("%s at step %d of %d", self.ledger.state.status, self.step, self.config.max_steps)

    def _abandon_preparation(self, signal_name: str) -> None:
        """Before the first step there is nothing to save, and the main thread may sit in a long library call."""
        message = f"stopped by {signal_name} before it began to train"
        try:
            self.ledger.finish("interrupted", stage="stopped", cause=signal_name, message=message)
        finally:  # whatever the disk says to it
            os._exit(EXIT_RESUMABLE)

    def _to_device(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(array).to(self.device) for array in batch)

    def _peak_memory_mib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return read_peak_bytes() / 2**20


# -------------------------------------------------------------------- starting it


def assist(config: TrainingConfig, run_dir: Path, stop: StopRequest, ranks: Ranks) -> int:
    """Train with the run's owner, in a copy of what it has made of the run; returns the exit status."""
    if not ranks.is_any(False):
        return EXIT_DONE
    ranks.wait_for_all()
    with copied(Run.open(run_dir)) as copy:
        Trainer(config, copy, stop, ranks).assist()
    return EXIT_DONE


def main(arguments: list[str], stop: StopRequest | None = None) -> int:
    """Train the run directory that is the one argument; returns the exit status.

    Args:
        stop: listens to signals already; left out, they are listened to from here on.
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m scripts.trainer RUN_DIR (a folder with a config.json; there are no flags)\n")
        return EXIT_BAD_CONFIG
    log_to_standard_error()
    try:
        run_dir = paths.resolve_run_dir(arguments[0], "RUN_DIR")
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_BAD_CONFIG
    try:
        config = TrainingConfig.from_json((run_dir / paths.CONFIG).read_text())
    except (OSError, UnicodeDecodeError) as error:
        logger.error("%s must hold a readable %s, but: %s; start runs with launch()", run_dir, paths.CONFIG, error)
        return EXIT_BAD_CONFIG
    except ConfigError as error:
        logger.error("%s: %s", run_dir / paths.CONFIG, error)
        return EXIT_BAD_CONFIG
    if stop is None:
        stop = StopRequest.listening()
    try:
        ranks = Ranks.join()
        if not ranks.is_first:
            return assist(config, run_dir, stop, ranks)
        result = Trainer(config, run_dir, stop, ranks).train()
    except HydraError as error:
        logger.error("%s", error)
        return EXIT_FAILED
    return EXIT_DONE if result.status == "done" else EXIT_RESUMABLE


if __name__ == "__main__":
    exit_status = main(sys.argv[1:], asked_to_stop)
    if exit_status in (EXIT_DONE, EXIT_RESUMABLE):
        # All that a run leaves is written and closed; taking the interpreter apart would take half a second more.
        logging.shutdown()
        os._exit(exit_status)
    sys.exit(exit_status)
