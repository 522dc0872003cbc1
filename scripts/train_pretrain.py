"""`python -m scripts.train_pretrain RUN_DIR`: pre-train the `debug` preset in RUN_DIR without a notebook.

For any other config there is `pretrain` from Python, or a notebook. There are no flags.
"""

import sys
from pathlib import Path

from hydra.errors import HydraError
from hydra.runtime import paths
from scripts import trainer
from scripts.config import TrainingConfig
from scripts.launch import write_config_once


def pretrain(run_dir: str | Path, **parameters: object) -> trainer.RunResult:
    """Train in this process what a notebook with these parameters would train, or go on with it.

    Raises:
        ConfigError: a parameter cannot be run.
        RunError: the directory holds another config, or has an owner.
    """
    return trainer.Trainer(TrainingConfig.from_parameters(parameters), run_dir).train()


def main(arguments: list[str]) -> int:
    """Returns the trainer's exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m scripts.train_pretrain RUN_DIR (there are no flags)\n")
        return trainer.EXIT_BAD_CONFIG
    try:
        write_config_once(TrainingConfig(), paths.resolve_run_dir(arguments[0], "RUN_DIR"))
    except HydraError as error:
        sys.stderr.write(f"{error}\n")
        return trainer.EXIT_BAD_CONFIG
    return trainer.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
