"""Is a run what it says? Every file as it was written, and some of its steps computed again, bit for bit.

    python -m diagnostics.verify_run RUN_DIR [STEPS] [--trust-code]

Steps (20) are computed from the start and from every checkpoint that is kept, and compared with metrics.jsonl and with
the next checkpoint. The shards must be where the run's data_dir says. Exit status 1 when something is not as it was.
"""

import argparse
import sys

from hydra.errors import HydraError
from hydra.runtime import Run
from scripts.replay import verify


def main(arguments: list[str]) -> int:
    """Print what is not as it should be."""
    parser = argparse.ArgumentParser("python -m diagnostics.verify_run", description="Is a finished run what it says?")
    parser.add_argument("run_dir")
    parser.add_argument("steps", type=int, nargs="?", default=20, help="to compute again from each place")
    parser.add_argument("--trust-code", action="store_true", help="run attention classes that the run holds in code/")
    given = parser.parse_args(arguments)
    try:
        run = Run.open(given.run_dir)
        found = verify(run, given.steps, trust_code=given.trust_code)
    except HydraError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for problem in found.problems:
        print(problem)
    print(f"{run.name}: {found.describe()}")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
