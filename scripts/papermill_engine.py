"""The engine `hydra`: hydra.notebook's engine, bound to `TrainingConfig`. papermill finds it by its entry point."""

import json
import os
import typing
from pathlib import Path

from hydra.data import check_corpus
from hydra.errors import ConfigError, RunError
from hydra.notebook.doors import guard_paths
from hydra.notebook.engine import NotebookEngine, silence_unknown_parameters
from hydra.notebook.parameters import RUN_DIR, with_trap_hints
from hydra.notebook.plan import COMPARISON, TRAINING, Plan, Request
from hydra.runtime import Run, workspace_root
from hydra.runtime.choices import check_device
from hydra.runtime.paths import CONFIG, check_folder, next_free
from hydra.runtime.secrets import refuse_secrets
from scripts.comparison import ComparisonConfig
from scripts.config import TrainingConfig, refuse_changed_config


class HydraEngine(NotebookEngine):
    """Executes a notebook whose parameters are fields of `TrainingConfig`, or of `ComparisonConfig`."""

    engine_name = "hydra"

    @classmethod
    def plan(cls, request: Request) -> Plan:
        """The config that the parameters ask for, checked with its corpus and with what the run directory holds.

        Raises:
            ConfigError: a parameter, an option or a combination cannot be run, or not on this machine.
            DataError: the corpus is missing or empty.
            RunError: the run directory holds another config, or a file of it is damaged.
        """
        config = _read_config(request)
        refuse_secrets(json.loads(config.to_json()))
        training = config.training_config(config.baseline) if isinstance(config, ComparisonConfig) else config
        check_corpus(training.data_spec(), workspace_root())
        check_device(training.device)
        _check_data_dir(workspace_root() / training.data_dir)
        arguments = config.papermill_arguments()
        # A notebook that makes a config in its code asks for another than the parameters say: launch() compares that.
        is_known = request.reads_parameters
        if is_known or not (request.run_dir / CONFIG).is_file():
            try:
                refuse_changed_config(config, request.run_dir)
            except RunError as error:
                command = request.command(cls.engine_name, arguments, next_free(request.run_dir))
                raise RunError(f"{error}\nThe whole command: {command}") from None
        Run(request.run_dir).check_files()
        return Plan(
            run_dir=request.run_dir,
            job=request.job,
            notebook_name=request.notebook_name,
            question=config.question() if is_known else "The config is made in this notebook's code.",
            command=request.command(cls.engine_name, arguments, request.run_dir),
            config=json.loads(config.to_json()) if is_known else {},
            differences=config.differences() if is_known else {},
        )


def _check_data_dir(data_dir: Path) -> None:
    """A folder that holds tokenized text already may be one that is only read."""
    is_folder = os.path.isdir(data_dir)  # noqa: PTH112  (Path.is_dir raises for a name that is too long)
    holds_datasets = is_folder and any(data_dir.glob("*/manifest.json"))
    if not holds_datasets:
        check_folder("data_dir", data_dir)


def _read_config(request: Request) -> TrainingConfig | ComparisonConfig:
    """The config of the kind of job that the notebook says it is."""
    kinds: dict[str, type[TrainingConfig] | type[ComparisonConfig]]
    kinds = {TRAINING: TrainingConfig, COMPARISON: ComparisonConfig}
    if request.job not in kinds:
        raise ConfigError(
            f"a notebook's metadata hydra.job must be one of {', '.join(kinds)}, but got {request.job!r}; correct it"
        )
    kind = kinds[request.job]
    types = {"preset": str, RUN_DIR: str, **typing.get_type_hints(TrainingConfig, include_extras=True)}
    if kind is ComparisonConfig:
        types |= typing.get_type_hints(ComparisonConfig, include_extras=True)
    stored = [name for name in request.secrets if name in types]
    if stored:
        raise ConfigError(
            f"a parameter marked as secret must be the notebook's own, but {', '.join(stored)} stands in the run's "
            "config and report; take the mark away, or give the parameter another name"
        )
    try:
        return kind.from_parameters(request.parameters)
    except ConfigError as error:
        raise with_trap_hints(error, request.parameters, types) from None


# papermill logs, and reads the notebook, before it calls an engine: what is to be there must come with the entry point.
silence_unknown_parameters(HydraEngine.engine_name)
guard_paths(HydraEngine.engine_name)
