"""Is a run what it says? Every file as it was written, and some of its steps computed again, bit for bit.

    python -m diagnostics.verify_run RUN_DIR [STEPS]

Steps (20) are computed from the start and from every checkpoint that is kept, and compared with metrics.jsonl and with
the next checkpoint. The shards must be where the run's data_dir says. Exit status 1 when something is not as it was.
"""

import sys

from hydra.errors import HydraError
from hydra.runtime import Run
from scripts.replay import verify


def main(arguments: list[str]) -> int:
    """Print what is not as it should be."""
    if not 1 <= len(arguments) <= 2:
        sys.stderr.write("usage: python -m diagnostics.verify_run RUN_DIR [STEPS]\n")
        return 2
    n_problems = 0
    try:
        run = Run.open(arguments[0])
        for problem in verify(run, *(int(count) for count in arguments[1:])):
            n_problems += 1
            print(problem, flush=True)
    except HydraError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    print(
        f"{run.name}: {n_problems} problem{'s' * (n_problems > 1)}"
        if n_problems
        else f"{run.name}: all is as it was written and computed"
    )
    return 1 if n_problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
