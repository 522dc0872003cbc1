"""Does a run survive what machines do? `make storm`, or

    python -m diagnostics.storm [KILLS] [ROUNDS]

KILLS (200) times a real trainer is killed while it trains, on one of its paths or another; ROUNDS (50) times a file
of its newest checkpoint is damaged, and as often it is asked to stop. Every time the same command is given again, and
at the end the weights, the figures and the samples are compared with those of a run that nothing disturbed. Then come
a notebook and files that mean harm (diagnostics/hostile.py). The tests do the same in short.
"""

import logging
import os
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from diagnostics.hostile import HostileTally, try_everything
from hydra.errors import CheckpointError
from hydra.runtime import Run
from hydra.runtime.checkpoint import check_checkpoint, list_checkpoints
from hydra.testing import storm
from scripts.config import TrainingConfig

logger = logging.getLogger(__name__)
N_KILLS, N_ROUNDS = 200, 50
REQUESTS = (["SIGTERM"], ["SIGTERM", "SIGTERM"], ["SIGINT"], ["SIGHUP"])


@dataclass
class Tally:
    """What was done, and what came of it."""

    kills: int = 0
    kills_survived: int = 0
    damaged: int = 0
    detected: int = 0
    mended: int = 0
    stops: int = 0
    steps_lost: int = 0
    false_done: int = 0
    problems: list[str] = field(default_factory=list)
    """What would have needed a hand."""
    hostile: HostileTally = field(default_factory=HostileTally)

    def table(self) -> str:
        """The result in Markdown."""
        rows = {
            "kills survived with equal weight hash": f"{self.kills_survived} of {self.kills}",
            "manual interventions": len(self.problems),
            "injected corruption detected": f"{self.detected} of {self.damaged}",
            "damaged checkpoints gone on without, to an equal weight hash": f"{self.mended} of {self.damaged}",
            "steps lost on SIGTERM, SIGINT, SIGHUP": f"{self.steps_lost} in {self.stops} stops",
            "false `done`": self.false_done,
            **self.hostile.rows(),
        }
        return "\n".join(["| what | result |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])

    def is_good(self) -> bool:
        """Whether nothing was lost, and nothing hostile came through."""
        survived = (self.kills_survived, self.mended, self.detected) == (self.kills, self.damaged, self.damaged)
        return survived and not (self.problems or self.steps_lost or self.false_done) and self.hostile.is_good()

    def compare(self, run_dir: Path, undisturbed: Path) -> bool:
        """Whether a run that says that it is done is what it would have been."""
        different = storm.differences(run_dir, undisturbed)
        if different:
            self.problems.append(f"{run_dir.name}: other {', '.join(different)} than undisturbed")
            self.false_done += Run.open(run_dir).status().status == "done"
        return not different


class Workshop:
    """A folder of runs, each made when it is needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._n_runs = 0

    def make_run(self, path: str) -> Path:
        """The directory of a run that has not begun, on one of `storm.RUNS`."""
        self._n_runs += 1
        run_dir = self._folder / f"{path}-{self._n_runs}"
        run_dir.mkdir()
        config = TrainingConfig.preset(
            "tiny",
            **storm.RUNS[path],
            corpus=str(storm.ROOT / "tests" / "assets" / "notes"),
            data_dir=str(self._folder / "data"),
            threads=1,
        )
        (run_dir / "config.json").write_text(config.to_json())
        return run_dir

    def finish(self, path: str) -> Path:
        """A run that nothing disturbed."""
        run_dir = self.make_run(path)
        storm.finish(run_dir)
        return run_dir


def kill(workshop: Workshop, path: str, undisturbed: Path, n_kills: int, moments: random.Random, tally: Tally) -> None:
    """Kill runs on `path` until there were `n_kills`."""
    left = n_kills
    while left > 0:
        run_dir = workshop.make_run(path)
        try:
            n_killed = len(storm.kill_until_done(run_dir, left, moments))
        except storm.StormError as error:
            tally.problems.append(str(error))
            tally.kills += 1
            left -= 1
            continue
        tally.kills += n_killed
        tally.kills_survived += n_killed * tally.compare(run_dir, undisturbed)
        left -= n_killed
        logger.info("%s: %d of %d kills", path, n_kills - left, n_kills)


def damage(undisturbed: Path, moments: random.Random, tally: Tally) -> None:
    """Damage one file of the newest checkpoint of a run that was cut off, and let it go on."""
    run_dir = undisturbed.with_name(f"damaged-{tally.damaged}")
    shutil.copytree(undisturbed, run_dir)
    storm.cut_off_after(run_dir, storm.LONG["max_steps"] - 1)
    newest = list_checkpoints(run_dir)[-1]
    name, harm = moments.choice(list(storm.every_damage(newest)))
    harm(newest / name, moments)
    tally.damaged += 1
    try:
        check_checkpoint(newest)
    except CheckpointError:
        tally.detected += 1
    try:
        storm.finish(run_dir)
    except storm.StormError as error:
        tally.problems.append(f"{harm.__name__} of {name}: {error}")
        return
    is_kept = newest.with_name(f"damaged-{newest.name}").is_dir()
    tally.mended += tally.compare(run_dir, undisturbed) and is_kept
    shutil.rmtree(run_dir)


def stop(workshop: Workshop, undisturbed: Path, n_stops: int, moments: random.Random, tally: Tally) -> None:
    """Ask runs to stop, `n_stops` times."""
    while tally.stops < n_stops:
        run_dir = workshop.make_run("plain")
        try:
            while tally.stops < n_stops:
                lost = storm.stop_at_random(run_dir, REQUESTS[tally.stops % len(REQUESTS)], moments)
                if lost < 0:
                    break
                tally.stops += 1
                tally.steps_lost += lost
            storm.finish(run_dir)
        except storm.StormError as error:
            tally.stops += 1
            tally.problems.append(str(error))
            continue
        tally.compare(run_dir, undisturbed)


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 when nothing was lost and nothing hostile came through."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    n_kills, n_rounds = map(int, [*arguments, *(str(N_KILLS), str(N_ROUNDS))[len(arguments) :]])
    seed = int.from_bytes(os.urandom(4), "little")
    logger.info("moments drawn with seed %d", seed)
    moments, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        plain = workshop.finish("plain")
        for index, path in enumerate(storm.RUNS):
            share = len(range(index, n_kills, len(storm.RUNS)))
            kill(workshop, path, plain if path == "plain" else workshop.finish(path), share, moments, tally)
        for _ in range(n_rounds):
            damage(plain, moments, tally)
            logger.info("%d of %d checkpoints damaged", tally.damaged, n_rounds)
        stop(workshop, plain, n_rounds, moments, tally)
        try_everything(Path(folder), plain, tally.hostile)
    for problem in [*tally.problems, *tally.hostile.complaints()]:
        logger.error("%s", problem)
    print(tally.table())
    return 0 if tally.is_good() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
