"""The engine `hydra`: hydra.notebook's engine, bound to `TrainingConfig`. papermill finds it by its entry point."""

import json
import typing

from hydra.data import check_corpus
from hydra.errors import ConfigError, RunError
from hydra.notebook.engine import NotebookEngine, silence_unknown_parameters
from hydra.notebook.parameters import with_trap_hints
from hydra.notebook.plan import Plan, Request
from hydra.runtime import workspace_root
from hydra.runtime.choices import check_device
from hydra.runtime.paths import next_free
from scripts.config import TrainingConfig, refuse_changed_config


class HydraEngine(NotebookEngine):
    """Executes a notebook whose parameters are fields of `TrainingConfig`."""

    engine_name = "hydra"

    @classmethod
    def plan(cls, request: Request) -> Plan:
        """The config that the parameters ask for, checked with its corpus and with what the run directory holds.

        Raises:
            ConfigError: a parameter, an option or a combination cannot be run, or not on this machine.
            DataError: the corpus is missing or empty.
            RunError: the run directory holds another config.
        """
        try:
            config = TrainingConfig.from_parameters(request.parameters)
        except ConfigError as error:
            types = {"preset": str, **typing.get_type_hints(TrainingConfig, include_extras=True)}
            raise with_trap_hints(error, request.parameters, types) from None
        check_corpus(config.data_spec(), workspace_root())
        check_device(config.device)
        arguments = config.papermill_arguments()
        try:
            refuse_changed_config(config, request.run_dir)
        except RunError as error:
            command = request.command(cls.engine_name, arguments, next_free(request.run_dir))
            raise RunError(f"{error}\nThe whole command: {command}") from None
        return Plan(
            run_dir=request.run_dir,
            notebook_name=request.notebook_name,
            question=_question(config),
            command=request.command(cls.engine_name, arguments, request.run_dir),
            config=json.loads(config.to_json()),
            differences=config.differences(),
        )


def _question(config: TrainingConfig) -> str:
    """What was asked for, in words."""
    tokens_per_step = config.batch_size * config.context_length
    changed = [
        f"{name} {json.dumps(value)} (preset: {json.dumps(theirs)})"
        for name, (theirs, value) in config.differences().items()
    ]
    corpus = "the default corpus" if config.corpus == ("default",) else ", ".join(config.corpus)
    return (
        f"How well does a model of {config.n_layers} blocks, {config.d_model} wide, with {config.attention} attention "
        f"learn {corpus} in {config.max_steps:,} steps of {tokens_per_step:,} tokens? "
        f"Preset {config.preset_name}, {'with ' + ', '.join(changed) if changed else 'unchanged'}; seed {config.seed}."
    )


# papermill logs before it calls an engine: a filter that is to be there must come with the entry point.
silence_unknown_parameters(HydraEngine.engine_name)
