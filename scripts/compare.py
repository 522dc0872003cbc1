"""The one comparer. `python -m scripts.compare DIR` runs the comparison that config.json in there describes, or goes
on with it.

Every arm's learning rate is chosen on a seed of its own, from equally many; then each arm trains on the same seeds. A
run is a folder under DIR/runs, named by the hash of its config: comparisons in which an arm has the same config share
it, and what is done stays done after a kill. `results.json` is written anew after each comparison and measured length.
"""

if __name__ == "__main__":
    # Importing torch takes a second or more, in which a request to stop must be heard too.
    from hydra.runtime.signals import StopRequest

    asked_to_stop = StopRequest.listening()

import hashlib
import logging
import math
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hydra.attention.checks.before_training import check_before_training
from hydra.attention.code import load_copies
from hydra.compare import ArmResult, Comparison, LearningRateChoice, choose_learning_rates, compare_arms
from hydra.errors import ComparisonError, ConfigError, HydraError, NotFiniteError, SpikeError
from hydra.runtime import Run, paths
from hydra.runtime.disk import raising_disk_full
from hydra.runtime.environment import describe_session, record_session
from hydra.runtime.ledger import Ledger
from hydra.runtime.logs import log_to_standard_error, logging_to
from hydra.runtime.records import append_record, keep_records
from hydra.runtime.signals import StopRequest
from scripts.arms import Arm, LeftOut, build_all_arms, count_runs, describe_shortcomings
from scripts.attention_costs import measure_costs
from scripts.comparison import ComparisonConfig
from scripts.config import TrainingConfig
from scripts.recovery import CAUSES, cause_and_message
from scripts.trainer import EXIT_BAD_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, Trainer

logger = logging.getLogger(__name__)
TUNING_SEED = 1_000_000
"""Learning rates are chosen on this seed, which is none of those that arms are compared on."""
UNIT = "bits per byte"
DIVERGED = (NotFiniteError, SpikeError)
"""How the run of an arm ends that diverges: a result of the comparison, and no failure of it."""
BASELINE_DIVERGED = (
    "the baseline {} must train without diverging, but did not ({}); lower learning_rate and muon_learning_rate"
)


class Stopped(Exception):
    """A stop was asked for; what was done is kept."""


class Trained(NamedTuple):
    """What the comparison takes from a run of an arm."""

    val_bits_per_byte: float
    """Infinite where it diverged."""
    seconds: float
    cause: str | None
    """How the ledger calls what it diverged by; None where it did not."""


class _ArmTrainer(Trainer):
    """Tells the comparison, too, that it was stopped where a trainer ends its process on the spot."""

    comparison: Ledger

    def _abandon_preparation(self, signal_name: str) -> None:
        self.comparison.finish("interrupted", stage="stopped", cause=signal_name, message=f"stopped by {signal_name}")
        super()._abandon_preparation(signal_name)


class Comparer:
    """Runs what a ComparisonConfig describes, in its folder."""

    def __init__(self, config: ComparisonConfig, run_dir: Path, stop: StopRequest) -> None:
        self.config, self.run_dir, self.stop = config, run_dir, stop
        self.results: dict[str, Any] = {"comparisons": {}}
        self.arms: dict[str, tuple[list[Arm], list[LeftOut]]] = {}
        self.tokens: dict[str, int] = {}
        self.n_done = 0

    @raising_disk_full()
    def run(self) -> str:
        """Run to the end, or to a stop request; returns the status.

        Raises:
            RunError: the folder has an owner.
            HydraError: as the ledger then says.
        """
        self.ledger = Ledger.open(self.run_dir)
        try:
            if self.ledger.state.status != "done":
                with logging_to(self.run_dir / paths.LOG):
                    self._run_as_owner()
            return self.ledger.state.status
        finally:
            self.ledger.close()

    def _run_as_owner(self) -> None:
        self.ledger.begin(self.ledger.state.max_steps, unit="run")
        record_session(self.run_dir, describe_session(), {})
        keep_records(self.run_dir / paths.METRICS, lambda step: False)
        self.results = paths.read_json(self.run_dir / paths.RESULTS) or self.results
        try:
            self._run_all()
        except Stopped:
            signal_name = self.stop.signal_name
            self.ledger.finish("interrupted", stage="stopped", cause=signal_name, message=f"stopped by {signal_name}")
            return
        except BaseException as error:
            cause, message = cause_and_message(error)
            self.ledger.finish("failed", stage=self.ledger.state.stage, cause=cause, message=message)
            raise
        self.ledger.update(step=self.ledger.state.max_steps)
        self.ledger.finish("done", stage="done")

    @raising_disk_full()
    def _run_all(self) -> None:
        self._refuse_if_stopped()
        config = self.config
        load_copies(config.attention_code, self.run_dir / paths.CODE)
        self.ledger.update(stage="checking attention classes")
        for name in (config.baseline, *config.arms):
            training = config.training_config(name)
            specs = [layer.spec for layer in training.model_spec().plan_layers()]
            check_before_training(specs, training.context_length)
        self.ledger.update(stage="solving for equal arms")
        # All before the first run: what cannot be made equal is told in seconds, and not after hours.
        self.arms = build_all_arms(config)
        told = "\n".join(describe_shortcomings(config, self.arms)) or None
        self.ledger.update(max_steps=count_runs(config, self.arms), message=told)
        for equal, (arms, left_out) in self.arms.items():
            self.results["comparisons"].setdefault(equal, _describe_arms(arms, left_out))
        self._write()
        for equal in config.equal:
            self._compare(equal)
        self.ledger.update(stage="measuring speed and memory")
        for costs in measure_costs(config, self.results.get("costs", {}), self.results["comparisons"]):
            self._refuse_if_stopped()
            self.results["costs"] = costs
            self._write()

    # ---------------------------------------------------------------- one comparison

    def _compare(self, equal: str) -> None:
        """All arms made equal in one thing: choose their learning rates, train them on the seeds, compare."""
        config = self.config
        arms, left_out = self.arms[equal]
        found = self.results["comparisons"][equal] = _describe_arms(arms, left_out)
        if len(arms) == 1:
            return
        baseline = arms[0]
        base = config.training_config(config.baseline)
        rate = base.muon_learning_rate if base.optimizer == "muon" else base.learning_rate
        factor_of = {factor * rate: factor for factor in config.learning_rate_factors}
        tried: dict[str, dict[float, Trained]] = {arm.label: {} for arm in arms}
        for rate, factor in factor_of.items():
            for arm in arms:
                run_config = self._config_of(arm, factor, TUNING_SEED)
                tried[arm.label][rate] = self._train(run_config, f"equal {equal}: {arm.label}, rate {rate:g}")
        for arm in [arm for arm in arms if all(trained.cause for trained in tried[arm.label].values())]:
            causes = _causes(tried.pop(arm.label))
            if arm is baseline:
                raise ComparisonError(BASELINE_DIVERGED.format(baseline.label, causes))
            left_out.append(LeftOut(arm.name, f"it diverged at every learning rate that was tried ({causes})"))
            self.n_done += config.n_seeds
            arms.remove(arm)
        tuning = {
            name: {rate: trained.val_bits_per_byte for rate, trained in by_rate.items()}
            for name, by_rate in tried.items()
        }
        choices = choose_learning_rates(tuning)
        found["learning_rates"] = {name: _describe_choice(choices[name], tuning[name], name) for name in tuning}
        results = []
        for arm in arms:
            by_seed = {}
            for seed in range(config.n_seeds):
                run_config = self._config_of(arm, factor_of[choices[arm.label].learning_rate], seed)
                by_seed[seed] = self._train(run_config, f"equal {equal}: {arm.label}, seed {seed}")
            if any(trained.cause for trained in by_seed.values()):
                if arm is baseline:
                    raise ComparisonError(BASELINE_DIVERGED.format(baseline.label, _causes(by_seed)))
                left_out.append(_diverged(arm, by_seed))
                continue
            figure_of = {seed: trained.val_bits_per_byte for seed, trained in by_seed.items()}
            seconds_of = {seed: trained.seconds for seed, trained in by_seed.items()}
            results.append(ArmResult(arm.label, figure_of, seconds_of))
        found["left_out"] = [asdict(one) for one in left_out]
        found["figures"] = {result.name: {str(s): value for s, value in result.figures.items()} for result in results}
        comparison: Comparison | None = None
        if len(results) > 1:
            comparison = compare_arms(results, baseline.label, confidence=config.confidence, unit=UNIT)
        found["comparison"] = None if comparison is None else comparison.to_dict()
        self._write()

    def _config_of(self, arm: Arm, factor: float, seed: int) -> TrainingConfig:
        base = self.config.training_config(self.config.baseline)
        return self.config.training_config(
            arm.attention,
            d_feed_forward=arm.config.d_feed_forward,
            learning_rate=factor * base.learning_rate,
            muon_learning_rate=factor * base.muon_learning_rate,
            seed=seed,
        )

    def _train(self, config: TrainingConfig, stage: str) -> Trained:
        """What comes of the run of this config, which is trained unless it was."""
        self._refuse_if_stopped()
        self.ledger.update(stage=stage)
        run_dir = self.run_dir / "runs" / hashlib.sha256(config.to_json().encode()).hexdigest()[:16]
        run = Run(run_dir)
        if not _is_settled(run):
            trainer = _ArmTrainer(config, run_dir, self.stop)
            trainer.comparison = self.ledger
            # The compiled forms of hundreds of runs would come to count against torch's limit.
            torch.compiler.reset()
            run_dir.mkdir(parents=True, exist_ok=True)
            try:
                trainer.train()
            except DIVERGED as error:
                logger.warning("%s: %s", stage, error)
        self._refuse_if_stopped()
        status = run.status()
        figure, cause = math.inf, status.cause
        if status.status == "done":
            assert status.val_bits_per_byte is not None
            figure, cause = status.val_bits_per_byte, None
            shutil.rmtree(run_dir / paths.CHECKPOINTS, ignore_errors=True)  # hundreds of runs' weights fill a disk
        self.n_done += 1
        self.tokens[run_dir.name] = status.tokens
        self.ledger.update(step=self.n_done, tokens=sum(self.tokens.values()))
        record = {"step": self.n_done, "run": run_dir.name, "what": stage, "seconds": round(status.train_s, 3)}
        record |= {"val_bits_per_byte": figure} if cause is None else {"diverged": cause}
        append_record(self.run_dir / paths.METRICS, record)
        return Trained(figure, status.train_s, cause)

    def _refuse_if_stopped(self) -> None:
        if self.stop.is_set:
            raise Stopped

    def _write(self) -> None:
        paths.write_json(self.run_dir / paths.RESULTS, self.results)


def _is_settled(run: Run) -> bool:
    """Whether the run is done, or diverged: what failed for another reason is tried again."""
    status = run.status()
    return status.status == "done" or (status.status == "failed" and status.cause in map(CAUSES.get, DIVERGED))


def _describe_arms(arms: list[Arm], left_out: list[LeftOut]) -> dict[str, Any]:
    return {"arms": [arm.to_dict() for arm in arms], "left_out": [asdict(one) for one in left_out], "comparison": None}


def _describe_choice(choice: LearningRateChoice, figures: Mapping[float, float], name: str) -> dict[str, Any]:
    tried = {f"{rate:g}": figure if math.isfinite(figure) else None for rate, figure in figures.items()}
    return {"tried": tried, "chosen": choice.learning_rate, "warning": choice.warning(name)}


def _diverged(arm: Arm, by_seed: Mapping[int, Trained]) -> LeftOut:
    seeds = ", ".join(str(seed) for seed, trained in by_seed.items() if trained.cause)
    return LeftOut(arm.name, f"it diverged on seed {seeds} at the rate that was best in tuning ({_causes(by_seed)})")


def _causes(runs: Mapping[Any, Trained]) -> str:
    """What runs diverged by, each once."""
    return ", ".join(sorted({trained.cause for trained in runs.values() if trained.cause}))


def main(arguments: list[str], stop: StopRequest | None = None) -> int:
    """Run the comparison of the folder that is the one argument; returns the exit status, as that of a trainer.

    Args:
        stop: listens to signals already; left out, they are listened to from here on.
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m scripts.compare DIR (a folder with a config.json; there are no flags)\n")
        return EXIT_BAD_CONFIG
    log_to_standard_error()
    try:
        run_dir = paths.resolve_run_dir(arguments[0], "DIR")
    except ConfigError as error:
        logger.error("%s", error)
        return EXIT_BAD_CONFIG
    try:
        config = ComparisonConfig.from_json((run_dir / paths.CONFIG).read_text())
    except (OSError, ValueError, ConfigError) as error:
        logger.error("%s must hold the config of a comparison, but: %s", run_dir / paths.CONFIG, error)
        return EXIT_BAD_CONFIG
    if stop is None:
        stop = StopRequest.listening()
    try:
        status = Comparer(config, run_dir, stop).run()
    except HydraError as error:
        logger.error("%s", error)
        return EXIT_FAILED
    return EXIT_DONE if status == "done" else EXIT_RESUMABLE


if __name__ == "__main__":
    exit_status = main(sys.argv[1:], asked_to_stop)
    logging.shutdown()
    os._exit(exit_status)
