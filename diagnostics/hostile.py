"""Does a secret leak, a script run in a report, or a pickle load? The part of `make storm` that disturbs by content.

One batch run of the real notebook tells canary secrets in every way and holds text that would run in a page in every
place. Then files that Python would run are given for those of a finished run. Each row has a control, so that none is 0
because nothing was tried.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hydra.errors import HydraError
from hydra.notebook.plan import COMPARISON, TRAINING
from hydra.runtime import Run, paths
from hydra.runtime.secrets import MASK
from hydra.testing import storm
from hydra.testing.hostile import files, job, pages, secrets
from scripts.trainer import EXIT_BAD_CONFIG, EXIT_FAILED

logger = logging.getLogger(__name__)
TO_TRAINERS = {"checkpoints/*/model.safetensors": EXIT_FAILED, "config.json": EXIT_BAD_CONFIG}
"""Files of a run that are given to the trainer's command too, with the status by which it must refuse them."""


@dataclass
class HostileTally:
    """What was offered, and what came of it."""

    artifacts: int = 0
    leaks: list[str] = field(default_factory=list)
    reports: int = 0
    strings: int = 0
    """Hostile strings that have arrived in a report, summed over reports."""
    live: list[str] = field(default_factory=list)
    offered: int = 0
    to_trainers: int = 0
    loads: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What would make a row say less than it seems to."""

    def rows(self) -> dict[str, str]:
        """Rows of the storm's table."""
        n_in_functions = self.offered - self.to_trainers
        return {
            "canary secrets in any artifact": (
                f"{len(self.leaks)} ({len(secrets.CORES)} canaries searched in {self.artifacts} artifacts)"
            ),
            "live script in any report": (
                f"{len(self.live)} ({self.strings} hostile strings shown in {self.reports} reports)"
            ),
            "pickle loads": (
                f"{len(self.loads)} ({self.offered} hostile files offered, {n_in_functions} to what reads them and "
                f"{self.to_trainers} to trainers)"
            ),
        }

    def is_good(self) -> bool:
        """Whether nothing came through, and all was tried."""
        was_tried = self.artifacts and self.reports and self.offered
        return bool(was_tried) and not (self.leaks or self.live or self.loads or self.problems)

    def complaints(self) -> list[str]:
        """All that is not as it must be."""
        return [*self.leaks, *self.live, *self.loads, *self.problems]


def try_everything(folder: Path, undisturbed: Path, tally: HostileTally) -> None:
    """Do all of it in `folder`; files are given for those of copies of a finished run."""
    run_job(folder, tally)
    logger.info("a hostile notebook has run; files come next")
    check_payloads(folder, tally)
    for kind in files.PAYLOADS:
        for pattern, read in files.READERS:
            offer(undisturbed, kind, pattern, partial(ask_reader, read), tally)
    for kind in files.OPENERS:
        for pattern, status in TO_TRAINERS.items():
            offer(undisturbed, kind, pattern, partial(ask_trainer, status), tally)
            tally.to_trainers += 1
    logger.info("%d hostile files offered", tally.offered)


# -------------------------------------------------------------------- a batch run


def run_job(folder: Path, tally: HostileTally) -> None:
    """Run the hostile notebook, search all that it left, and look at reports of it."""
    root = folder / "job"
    root.mkdir()
    done = job.run_job(root, storm.ROOT / "tests" / "assets" / "notes", {})
    if done.returncode != 1 or not (root / job.REPORT).is_file():
        tally.problems.append(f"a hostile notebook must end by its last cell, with a report, but got:\n{done.stderr}")
        return
    found = job.artifacts(root)
    tally.artifacts += len(found)
    tally.leaks += secrets.find_leaks(found)
    for path in job.TOLD:
        if MASK not in (root / path).read_text():
            tally.problems.append(f"{path} must have been told secrets, but nothing is masked in it")
    check_report(root / job.REPORT, tally)
    for kind in (TRAINING, COMPARISON):
        run_dir = folder / f"{kind}-{job.NAME}"
        shutil.copytree(root / job.RUN, run_dir)
        check_report(pages.render_with_vectors(run_dir, kind), tally)


def check_report(path: Path, tally: HostileTally) -> None:
    """Count a report, the hostile strings that it shows, which must be all, and what must not be in it."""
    page = pages.read_page(path)
    n_shown = pages.count_marks(page)
    tally.reports += 1
    tally.strings += n_shown
    tally.live += [f"{path} holds {wrong}" for wrong in page.wrong]
    if n_shown != len(pages.VECTORS):
        tally.problems.append(f"{path} must show {len(pages.VECTORS)} hostile strings, but shows {n_shown}")


# -------------------------------------------------------------------- files


def check_payloads(folder: Path, tally: HostileTally) -> None:
    """The control: each payload that can run does where it is opened as it must not be."""
    sentinel = folder / "control"
    for kind, open_payload in files.OPENERS.items():
        open_payload(files.PAYLOADS[kind](sentinel))
        if not sentinel.exists():
            tally.problems.append(f"{kind} must touch its sentinel where it is opened, but does not")
        sentinel.unlink(missing_ok=True)


def offer(undisturbed: Path, kind: str, pattern: str, ask: Callable[[Path], str], tally: HostileTally) -> None:
    """Give a hostile file for one of a run, which must be refused by its name and load nothing."""
    run_dir = files.copy_with_shards(undisturbed, undisturbed.with_name(f"offered-{tally.offered}"))
    sentinel = run_dir.with_name(f"{run_dir.name}-sentinel")
    path = files.put(run_dir, pattern, files.PAYLOADS[kind](sentinel))
    refusal = ask(run_dir)
    tally.offered += 1
    if sentinel.exists():
        tally.loads.append(f"{kind} was loaded in the place of {pattern}")
        sentinel.unlink()
    if path.name not in refusal:
        tally.problems.append(f"{kind} for {pattern} must be refused by its name, but got: {refusal}")
    shutil.rmtree(run_dir)


def ask_reader(read: Callable[[Run], object], run_dir: Path) -> str:
    """What the refusal says when the run is read."""
    try:
        read(Run.open(run_dir))
    except HydraError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 (what was deceived may fail in any way)
        return f"no refusal, but {type(error).__name__}"
    return "no refusal"


def ask_trainer(status: int, run_dir: Path) -> str:
    """What the trainer's command says, which is to go on from the newest checkpoint."""
    (run_dir / paths.STATE).unlink()
    try:
        return storm.finish(run_dir, status=status)
    except storm.StormError as error:
        return str(error).partition("\n")[0]
