"""The one trainer. `python -m scripts.trainer RUN_DIR` trains what config.json in there says, or goes on with it.

Read it from the top: `Trainer.train` is the whole run, `train_step` one optimizer step, `forward_backward` its
gradient. `launch` starts it as a process of its own. Shapes: B rows, T tokens.

Exit status: 0 done, 1 failed, 2 bad config, 75 cut off and resumable.
"""

import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from hydra.data import Batch, Dataset, open_dataset, prepare_dataset
from hydra.errors import ConfigError, HydraError, NotFiniteError
from hydra.model.framework import HydraModel, build_model, generate
from hydra.optim import (
    build_parameter_groups,
    cosine,
    load_optimizer_tensors,
    optimizer_tensors,
    warmup_stable_decay,
)
from hydra.runtime import paths, workspace_root
from hydra.runtime.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from hydra.runtime.choices import choose_once, set_up_torch
from hydra.runtime.ledger import Ledger, Status
from hydra.runtime.records import MetricsWriter, append_record, keep_records, read_records
from hydra.runtime.signals import StopRequest
from scripts.config import TrainingConfig
from scripts.launch import launch, write_config_once

__all__ = ["RunResult", "StepResult", "Trainer", "launch"]

logger = logging.getLogger(__name__)
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
    """One optimizer step: mean loss in nats per token, L2 norm of the gradient before clipping, learning rate."""

    loss_nats: float
    grad_norm: float
    learning_rate: float


class Trainer:
    """Trains the model of `config` in `run_dir`, from the start or from the newest checkpoint there."""

    model: HydraModel
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    metrics: MetricsWriter

    def __init__(self, config: TrainingConfig, run_dir: str | Path, stop: StopRequest | None = None) -> None:
        """`stop` asks for an early end with a checkpoint; left out, only the last step ends the run."""
        self.config = config
        self.run_dir = (workspace_root() / run_dir).resolve()
        self.stop = stop or StopRequest()
        self.step = 0  # finished optimizer steps
        self.tokens = 0  # tokens that were trained on
        self._step_at_last_log = 0
        self._time_at_last_log = time.perf_counter()

    # ---------------------------------------------------------------- the run

    def train(self) -> RunResult:
        """Train to `max_steps`, or to a stop request.

        Raises:
            RunError: the directory holds another config, or has an owner.
            HydraError: as the ledger then says: bad data, a damaged checkpoint, a loss that is not finite.
        """
        write_config_once(self.config, self.run_dir)
        self.ledger = Ledger.open(self.run_dir, self.config.max_steps)
        try:
            self.stop.when_received = self._abandon_preparation
            if self.stop.signal_name:
                self._abandon_preparation(self.stop.signal_name)
            self._prepare()
            self.stop.when_received = None

            self._evaluate_if_due()
            while self.step < self.config.max_steps and not self.stop.is_set:
                self._log_if_due(self.train_step())
                self._evaluate_if_due()
                self._checkpoint_if_due()

            self._finish()
        except KeyboardInterrupt:
            self.ledger.finish(
                "interrupted", stage="stopped", cause="KeyboardInterrupt", message="stopped by its caller"
            )
            raise
        except HydraError as error:
            cause = "not finite" if isinstance(error, NotFiniteError) else type(error).__name__
            self.ledger.finish("failed", stage=self.ledger.state.stage, cause=cause, message=str(error))
            raise
        except BaseException as error:
            self.ledger.finish("failed", stage=self.ledger.state.stage, cause="error", message=repr(error))
            raise
        finally:
            self.ledger.close()
        state = self.ledger.state
        return RunResult(self.run_dir, state.status, self.step, state.val_loss_nats, state.val_bits_per_byte)

    def train_step(self) -> StepResult:
        """One optimizer step on the global batch of `self.step`.

        Raises:
            NotFiniteError: loss or gradient norm is not finite; nothing has moved.
        """
        config = self.config
        batch = self.dataset.train_batch(
            self.step, seed=config.seed, n_rows=config.batch_size, n_tokens=config.context_length
        )
        loss_nats = self.forward_backward(batch)
        grad_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.max_gradient_norm))
        if not (math.isfinite(loss_nats) and math.isfinite(grad_norm)):
            raise NotFiniteError(
                f"loss and gradient norm must be finite, but got {loss_nats=} and {grad_norm=} in step "
                f"{self.step + 1}; the weights have not moved. Lower learning_rate, or raise warmup_steps"
            )
        learning_rate = config.learning_rate * self._schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        self.step += 1
        self.tokens += batch.n_valid_tokens
        self.ledger.update(
            stage="training", step=self.step, tokens=self.tokens, train_flops=self.tokens * self.flops_per_token
        )
        return StepResult(loss_nats, grad_norm, learning_rate)

    def forward_backward(self, batch: Batch) -> float:
        """Accumulate the gradient of the mean loss over all valid tokens of the batch; returns that mean in nats.

        Each micro-batch contributes its sum divided by the whole batch's tokens, so how the batch is cut changes
        rounding and nothing else.
        """
        loss_nats = 0.0
        for start in range(0, self.config.batch_size, self.config.micro_batch_size):
            rows = batch.slice_rows(start, start + self.config.micro_batch_size)
            output = self.model(*self._to_device(rows))
            loss = torch.stack(list(output.losses.values())).sum() / batch.n_valid_tokens
            loss.backward()
            loss_nats += float(loss.detach())
        return loss_nats

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
                "loss_nats": result.loss_nats,
                "learning_rate": result.learning_rate,
                "grad_norm": result.grad_norm,
                "tokens_per_s": self.config.batch_size * self.config.context_length / step_s,
                "step_ms": 1000.0 * step_s,
                "peak_mem_mib": self._peak_memory_mib(),
                "elapsed_s": self.ledger.train_s,
            }
        )

    def _evaluate_if_due(self) -> None:
        """Evaluate and sample at the due steps; a run that was cut off before this was written does it on resume."""
        is_due = self.step % self.config.eval_every == 0 or self.step == self.config.max_steps
        if not is_due or self.step in self._evaluated_steps:
            return
        began = time.perf_counter()
        self.ledger.update(stage="evaluating")
        self.model.eval()
        loss_nats = self._validation_loss_nats()
        if loss_nats is None:
            return
        split = self.dataset.manifest["splits"]["validation"]
        figures = {
            "val_loss_nats": loss_nats,
            "val_bits_per_byte": loss_nats * self._n_validation_targets / (math.log(2) * split["n_bytes"]),
        }
        if self.config.sample_tokens:
            sample = {"step": self.step, "prompt": self.config.sample_prompt, "text": self._sample_text()}
            append_record(self.run_dir / paths.SAMPLES, sample)
        self.metrics.write({"step": self.step, "tokens": self.tokens, **figures, "elapsed_s": self.ledger.train_s})
        self._evaluated_steps.add(self.step)
        self.ledger.update(stage="training", **figures)
        self.model.train()
        self._time_at_last_log += time.perf_counter() - began

    @torch.no_grad()
    def _validation_loss_nats(self) -> float | None:
        """Mean loss over the whole validation text, in nats per token; None when a stop request came in between."""
        sum_nats, n_targets = 0.0, 0
        for batch in self.dataset.validation_batches(
            n_rows=self.config.micro_batch_size, n_tokens=self.config.context_length
        ):
            if self.stop.is_set:
                return None
            sum_nats += float(self.model(*self._to_device(batch)).losses["cross_entropy"])
            n_targets += batch.n_valid_tokens
        if not math.isfinite(sum_nats):
            raise NotFiniteError(f"the validation loss must be finite, but got {sum_nats=} after step {self.step}")
        self._n_validation_targets = n_targets
        return sum_nats / n_targets

    def _sample_text(self) -> str:
        tokenizer = self.dataset.tokenizer
        prompt = tokenizer.encode(self.config.sample_prompt, add_special_tokens=False)
        prompt_ids = [int(self.dataset.manifest["tokenizer"]["bos_id"]), *prompt.ids]
        ids = generate(
            self.model, prompt_ids, self.config.sample_tokens, temperature=0.8, top_k=50, seed=self.config.seed
        )
        return tokenizer.decode(ids)

    def _checkpoint_if_due(self) -> None:
        is_last = self.step == self.config.max_steps
        if not (self.step % self.config.checkpoint_every == 0 or is_last or self.stop.is_set):
            return
        began = time.perf_counter()
        self.ledger.update(stage="writing a checkpoint")
        tensors = {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
            "rng": {"torch_cpu": torch.get_rng_state()},
        }
        trainer_state = {
            "step": self.step,
            "tokens": self.tokens,
            "data_fingerprint": self.dataset.manifest["fingerprint"],
            "model_spec": self.config.model_spec(self._vocab_size).to_dict(),
        }
        save_checkpoint(self.run_dir, self.step, Checkpoint(tensors, trainer_state), self.config.keep_checkpoints)
        self.ledger.update(stage="training")
        self._time_at_last_log += time.perf_counter() - began

    # ---------------------------------------------------------------- before the first step, and after the last

    def _prepare(self) -> None:
        choices = choose_once(self.run_dir, device=self.config.device, threads=self.config.threads)
        set_up_torch(choices, self.config.seed)
        self.device = torch.device(choices.device)

        self.ledger.update(stage="preparing data")
        self.dataset = self._open_data()
        self._vocab_size = int(self.dataset.manifest["tokenizer"]["vocab_size"])

        self.ledger.update(stage="building the model")
        self.model = build_model(self.config.model_spec(self._vocab_size), seed=self.config.seed, device=self.device)
        self.flops_per_token = self.model.flops_per_token(self.config.context_length)
        self.optimizer = torch.optim.AdamW(
            build_parameter_groups(self.model, self.config.weight_decay),
            lr=self.config.learning_rate,
            betas=(self.config.adam_beta1, self.config.adam_beta2),
            eps=self.config.adam_eps,
            fused=True,
        )
        self._schedule = self._build_schedule()
        self.ledger.update(n_parameters=self.model.n_parameters())

        checkpoints = list_checkpoints(self.run_dir)
        if checkpoints:
            self._resume(checkpoints[-1])
        self.metrics = MetricsWriter(self.run_dir, self.step)
        records = read_records(self.run_dir / paths.METRICS)
        self._evaluated_steps = {record["step"] for record in records if "val_loss_nats" in record}
        # An evaluation is finished by its metrics; a sample without them is written again.
        keep_records(self.run_dir / paths.SAMPLES, self._evaluated_steps.__contains__)
        self._step_at_last_log, self._time_at_last_log = self.step, time.perf_counter()
        self.model.train()

    def _open_data(self) -> Dataset:
        data_dir = workspace_root() / self.config.data_dir
        manifest = paths.read_json(self.run_dir / paths.MANIFEST)
        if manifest:
            return open_dataset(manifest, data_dir)
        dataset = prepare_dataset(self.config.data_spec(), data_dir, workspace_root())
        paths.write_atomically(self.run_dir / paths.TOKENIZER, dataset.tokenizer.to_str())
        paths.write_json(self.run_dir / paths.MANIFEST, dataset.manifest)
        return dataset

    def _build_schedule(self) -> Callable[[int], float]:
        config = self.config
        shape = {"max_steps": config.max_steps, "warmup_steps": config.warmup_steps}
        if config.schedule == "cosine":
            return partial(cosine, **shape, final_fraction=config.final_learning_rate_fraction)
        return partial(
            warmup_stable_decay,
            **shape,
            decay_fraction=config.decay_fraction,
            final_fraction=config.final_learning_rate_fraction,
        )

    def _resume(self, directory: Path) -> None:
        """Put weights, optimizer, generator and counters back as they were when the checkpoint was written."""
        checkpoint = load_checkpoint(directory, groups=("model", "optimizer", "rng"))
        state = checkpoint.trainer_state
        assert state["data_fingerprint"] == self.dataset.manifest["fingerprint"], state
        self.model.load_state_dict(dict(checkpoint.tensors["model"]), strict=True)
        load_optimizer_tensors(self.model, self.optimizer, checkpoint.tensors["optimizer"])
        torch.set_rng_state(checkpoint.tensors["rng"]["torch_cpu"])
        self.step, self.tokens = int(state["step"]), int(state["tokens"])
        self.ledger.update(step=self.step, tokens=self.tokens)
        logger.info("going on from %s", directory)

    def _finish(self) -> None:
        self.metrics.close()
        self._checkpoint_if_due()
        if self.step == self.config.max_steps and self.step in self._evaluated_steps:
            self.ledger.finish("done", stage="done")
        else:
            signal_name = self.stop.signal_name
            message = f"stopped by {signal_name} after step {self.step}; its checkpoint is written"
            self.ledger.finish("interrupted", stage="stopped", cause=signal_name, message=message)
        logger.info("%s at step %d of %d", self.ledger.state.status, self.step, self.config.max_steps)

    def _abandon_preparation(self, signal_name: str) -> None:
        """Before the first step there is nothing to save, and the main thread may sit in a long library call."""
        message = f"stopped by {signal_name} before it began to train"
        self.ledger.finish("interrupted", stage="stopped", cause=signal_name, message=message)
        os._exit(EXIT_RESUMABLE)

    def _to_device(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(array).to(self.device) for array in batch)

    def _peak_memory_mib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# -------------------------------------------------------------------- starting it


def main(arguments: list[str]) -> int:
    """Train the run directory that is the one argument; returns the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(
            "usage: python -m scripts.trainer RUN_DIR (a folder with a config.json; there are no flags)",
            file=sys.stderr,
        )
        return EXIT_BAD_CONFIG
    run_dir = (workspace_root() / arguments[0]).resolve()
    try:
        config = TrainingConfig.from_json((run_dir / paths.CONFIG).read_text())
    except FileNotFoundError:
        print(
            f"{run_dir} must hold {paths.CONFIG}, but does not; start runs with launch() or `make report`",
            file=sys.stderr,
        )
        return EXIT_BAD_CONFIG
    except ConfigError as error:
        print(f"{run_dir / paths.CONFIG}: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    _set_up_logging(run_dir / paths.LOG)
    stop = StopRequest()
    stop.listen()
    try:
        result = Trainer(config, run_dir, stop).train()
    except HydraError as error:
        logger.error("%s", error)
        return EXIT_FAILED
    return EXIT_DONE if result.status == "done" else EXIT_RESUMABLE


def _set_up_logging(log: Path) -> None:
    """To the run's log, and to the terminal unless that already is the log (as under `launch`)."""
    handlers: list[logging.Handler] = [logging.FileHandler(log)]
    if not os.path.samestat(os.fstat(sys.stderr.fileno()), log.stat()):
        handlers.append(logging.StreamHandler())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=handlers)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
