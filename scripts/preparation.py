"""What a run settles before its first step: whether it may go on, its code, its data, its memory."""

import dataclasses
import logging
from pathlib import Path

from hydra.attention.checks.before_training import check_before_training
from hydra.data import Dataset, open_dataset, prepare_dataset
from hydra.errors import DataError, MemoryLimitError
from hydra.model.framework import Execution
from hydra.runtime import paths, workspace_root
from hydra.runtime.checkpoint import load_checkpoint
from hydra.runtime.choices import Choices, settle
from hydra.runtime.environment import is_code_checked, record_checked_code
from hydra.runtime.memory import MemoryPlan, read_memory
from hydra.runtime.memory.plan import allowed_memory, read_plan
from scripts.config import CHANGE_MEMORY, TrainingConfig, refuse_difference

logger = logging.getLogger(__name__)


def find_changes(
    config: TrainingConfig, run_dir: Path, newest: Path | None, n_ranks: int
) -> dict[str, tuple[object, object]]:
    """In what `config` differs from that of the checkpoint `newest`, as (before, now).

    Raises:
        RunError: one of the differences is not allowed.
    """
    if newest is None:
        return {}
    state = load_checkpoint(newest, groups=()).trainer_state
    stored = TrainingConfig.from_json(state["config"])
    refuse_difference(config, stored, run_dir)
    changes = config.differences(stored)
    n_ranks_before = state.get("n_ranks", 1)  # runs of before were of one process
    if n_ranks_before != n_ranks:
        changes["n_ranks"] = (n_ranks_before, n_ranks)
    return changes


def check_own_classes(config: TrainingConfig, run_dir: Path) -> None:
    """Once in a run: attention classes of one's own see neither later tokens nor other documents; ConfigError."""
    hashes = {path: record["sha256"] for path, record in config.attention_code.items()}
    if is_code_checked(run_dir, hashes):
        return
    specs = [layer.spec for layer in config.model_spec().plan_layers()]
    check_before_training(specs, config.context_length)
    record_checked_code(run_dir, hashes)


def open_data(config: TrainingConfig, run_dir: Path, newest: Path | None) -> Dataset:
    """The run's shards, prepared (again) when they are not there.

    Args:
        newest: the checkpoint that the run goes on from.

    Raises:
        DataError: they are not there, or are of another text or tokens than the checkpoint's; nothing is written then.
    """
    data_dir = workspace_root() / config.data_dir
    trained_on = None if newest is None else load_checkpoint(newest, groups=()).trainer_state["data_fingerprint"]
    path = run_dir / paths.MANIFEST
    manifest = paths.read_json(path)
    if manifest and trained_on not in (None, manifest.get("fingerprint")):
        raise DataError(
            f"{path} must name the data that the run has trained on, with the fingerprint {trained_on}, but names "
            f"{manifest.get('fingerprint')}; {paths.REMEDIES[paths.MANIFEST]}"
        )
    if manifest and (data_dir / manifest["fingerprint"]).exists():
        return open_dataset(manifest, data_dir)
    dataset = prepare_dataset(config.data_spec(), data_dir, workspace_root())
    if manifest:
        return open_dataset(manifest, data_dir)
    if trained_on not in (None, dataset.manifest["fingerprint"]):
        raise DataError(
            f"a run must go on with the data that it has trained on, with the fingerprint {trained_on}, but {path} is "
            f"missing and {', '.join(config.corpus)} as it is now gives {dataset.manifest['fingerprint']}; bring back "
            f"that text, or copy {data_dir / str(trained_on) / 'manifest.json'} to {path}"
        )
    paths.write_atomically(run_dir / paths.TOKENIZER, dataset.tokenizer.to_str())
    paths.write_json(run_dir / paths.MANIFEST, dataset.manifest)
    return dataset


def settle_memory(
    config: TrainingConfig, run_dir: Path, choices: Choices, vocab_size: int
) -> tuple[MemoryPlan, Choices]:
    """Choose micro-batch and checkpointing so that a step fits the memory, in the run's first session for good.

    Raises:
        MemoryLimitError: nothing that may be chosen fits, or this machine has less than the run needs.
    """
    stored = read_plan(run_dir)
    to_plan = what_to_plan(config, choices, stored)
    if stored and to_plan is None:
        limit = allowed_memory(read_memory(choices.device), config.memory_limit_mib)
        if stored.prediction.total > limit.limit_bytes:
            raise MemoryLimitError(
                f"going on with this run takes {stored.prediction.total / 2**20:,.0f} MiB, but this machine "
                f"allows {limit.limit_bytes / 2**20:,.0f} MiB ({limit.source}); go on where there is more"
            )
        return stored, choices
    # It pays to import this only here: a resumed run has its plan.
    from scripts.planning import plan_memory

    plan = dataclasses.replace(plan_memory(to_plan or config, choices, vocab_size), planned_for=_planned_for(config))
    logger.info("memory: %s", plan.describe())
    paths.write_json(run_dir / paths.MEMORY_PLAN, plan.to_dict())
    return plan, settle(
        run_dir,
        choices,
        micro_batch_size=plan.micro_batch_size,
        activation_checkpointing=plan.activation_checkpointing,
        optimizer_offload=plan.optimizer_offload,
    )


def what_to_plan(config: TrainingConfig, choices: Choices, stored: MemoryPlan | None) -> TrainingConfig | None:
    """The config whose memory is to be planned: None where `stored` holds for `config`.

    What the run chose stays, with what differs now only in what it takes; other rows or another batch choose anew.
    """
    if stored is None or not choices.micro_batch_size:
        return config
    asked = _planned_for(config)
    # A plan of before was made for the config of its run.
    changed = {name for name in asked if stored.planned_for and stored.planned_for[name] != asked[name]}
    if changed - {"checkpoints_in_background"}:
        return config
    if not changed and stored.checkpoint_bytes:  # which plans of before did not tell either
        return None
    return dataclasses.replace(
        config,
        micro_batch_size=choices.micro_batch_size,
        activation_checkpointing=choices.activation_checkpointing,  # type: ignore[arg-type]
        optimizer_offload="yes" if choices.optimizer_offload else "no",
    )


def _planned_for(config: TrainingConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in CHANGE_MEMORY}


def execution_of(choices: Choices) -> Execution:
    """How the model computes in a run of these choices."""
    return Execution(
        attention_kernel=choices.attention_kernel,
        kernels=choices.kernels,
        activation_checkpointing=choices.activation_checkpointing,
    )
