"""Weights & Biases (W&B): a process of its own follows a run's metrics.jsonl, so that no outage reaches the trainer.

`python -m hydra.runtime.send_to_wandb RUN_DIR online|offline PROJECT` hands to W&B what it lacks of a run, at any time.
The trainer starts the same with its process id behind that; then it follows the run, and ends soon after the trainer.
W&B's package is imported in that process only. Its files are in `wandb/` of the run directory.

What it sends is the config, and the records of metrics.jsonl: no code, no difference to a commit, no console output, no
command line, no host name and no figures of the machine.

Exit status: 0 W&B has everything, 1 it has not, 2 wrong arguments.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.runtime import paths
from hydra.runtime.ledger import read_status
from hydra.runtime.logs import FORMAT
from hydra.runtime.processes import ProcessIdentity
from hydra.runtime.records import read_records_from
from hydra.runtime.secrets import mask_texts
from hydra.runtime.tracking import EXIT_SENT, EXIT_UNSENT, FLUSH_S, TrackingMode, advice

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)
# Of a record in metrics.jsonl: its step, and the how manieth of that step it is (loss, then evaluation), from 1.
Place = tuple[int, int]

POLL_S = 0.25
ANSWER_TIMEOUT_S = 30.0
ASK_AGAIN_AFTER_S = 60.0
# W&B writes its file that often, so that what was handed over a poll ago survives even if everything is killed.
FILE_EVERY_S = POLL_S / 2
NICENESS = 19  # the cores are the trainer's; what it leaves of them suffices
EXIT_BAD_ARGUMENTS = 2


def track(run_dir: Path, mode: TrackingMode, project: str, trainer: ProcessIdentity | None) -> None:
    """Hand the run's records to W&B until `trainer` is done with it (None: those that are there)."""
    with _only_one(run_dir):
        run = _begin(run_dir, mode, project, trainer)
        sent = _sent(run, run_dir, mode)
        place, handed_over, offset, is_followed = (0, 0), sent, 0, True
        while is_followed:
            # Asked before reading, so that what is written up to the trainer's last word is read.
            is_followed = _is_at_work(run_dir, trainer)
            records, offset = read_records_from(run_dir / paths.METRICS, offset)
            _note(run_dir, sent=list(handed_over))
            for record in records:
                place = _place_after(place, record["step"])
                if place > sent:
                    run.log(record)
                    handed_over = place
            if is_followed:
                time.sleep(POLL_S)
        run.finish(exit_code=0 if read_status(run_dir).status == "done" else 1)
        _note(run_dir, sent=list(handed_over))


def _place_after(place: Place, step: int) -> Place:
    """The place of a record of `step` that follows the one at `place`."""
    return (step, place[1] + 1 if step == place[0] else 1)


def _begin(run_dir: Path, mode: TrackingMode, project: str, trainer: ProcessIdentity | None) -> "wandb.Run":
    """W&B's run, the same in every session; while the server does not answer, it is asked again and again."""
    import wandb

    is_first_try = True
    while True:
        try:
            run = wandb.init(
                mode=mode,
                project=project,
                id=_run_id(run_dir),
                resume="allow",
                name=run_dir.name,
                dir=run_dir,
                config=mask_texts(paths.read_json(run_dir / paths.CONFIG)),
                settings=_settings(),
            )
            run.define_metric("*", step_metric="step")
            return run
        except wandb.errors.CommError as error:
            if not _is_at_work(run_dir, trainer):
                raise
            if is_first_try:
                logger.warning(
                    "W&B does not answer; it is asked again every %d s, and the run goes on meanwhile: %s",
                    ASK_AGAIN_AFTER_S,
                    error,
                )
            is_first_try = False
            time.sleep(ASK_AGAIN_AFTER_S)


def _settings() -> "wandb.Settings":
    """W&B's, so that it sends what it is handed and nothing that it finds by itself."""
    import wandb

    return wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        host="",
        program="",
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        silent=True,
        symlink=False,
        init_timeout=ANSWER_TIMEOUT_S,
        x_transaction_log_flush_interval=FILE_EVERY_S,
    )


def _sent(run: "wandb.Run", run_dir: Path, mode: TrackingMode) -> Place:
    """The last record that W&B has: the last one handed over, but none that the server never got."""
    step, number = _noted(run_dir)["sent"]
    if mode == "offline":
        return (step, number)
    return min((step, number), (int(run.summary.get("step", 0)), sys.maxsize))


def _noted(run_dir: Path) -> dict[str, Any]:
    return {"sent": [0, 0], **paths.read_json(_folder(run_dir) / paths.TRACKED)}


def _note(run_dir: Path, **changes: object) -> None:
    before = _noted(run_dir)
    after = {**before, **changes}
    if after != before:
        paths.write_json(_folder(run_dir) / paths.TRACKED, after)


def _run_id(run_dir: Path) -> str:
    """Drawn once: the run's name may be another run's on another machine."""
    if "id" not in _noted(run_dir):
        _note(run_dir, id=secrets.token_hex(6))
    return str(_noted(run_dir)["id"])


def _folder(run_dir: Path) -> Path:
    return run_dir / paths.WANDB


@contextlib.contextmanager
def _only_one(run_dir: Path) -> Iterator[None]:
    """Wait for the process of the session before, which has seconds left, if any."""
    _folder(run_dir).mkdir(exist_ok=True)
    with open(_folder(run_dir) / paths.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_at_work(run_dir: Path, trainer: ProcessIdentity | None) -> bool:
    """Whether records may follow."""
    return trainer is not None and trainer.is_alive() and read_status(run_dir).is_alive


def _leave_after(run_dir: Path, trainer: ProcessIdentity | None) -> None:
    """End this process FLUSH_S after the trainer, wherever in W&B's code the main thread waits."""
    while _is_at_work(run_dir, trainer):
        time.sleep(POLL_S)
    time.sleep(FLUSH_S)
    os._exit(EXIT_UNSENT)


def main(arguments: list[str]) -> int:
    """Hand the run to W&B; returns the exit status."""
    if len(arguments) not in (3, 4) or arguments[1] not in ("online", "offline"):
        sys.stderr.write("usage: python -m hydra.runtime.send_to_wandb RUN_DIR online|offline PROJECT\n")
        return EXIT_BAD_ARGUMENTS
    run_dir = (paths.workspace_root() / arguments[0]).resolve()
    mode: TrackingMode = "online" if arguments[1] == "online" else "offline"
    project = arguments[2]
    logging.basicConfig(level=logging.INFO, format=FORMAT)
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # to W&B's makers
    trainer = None
    if len(arguments) == 4:
        os.nice(NICENESS)
        trainer = ProcessIdentity.of(int(arguments[3]))
        threading.Thread(target=_leave_after, args=(run_dir, trainer), daemon=True).start()
    import wandb

    try:
        track(run_dir, mode, project, trainer)
    except wandb.errors.Error as error:
        logger.error(
            "W&B does not follow this run: %s. To send what is missing, later: %s",
            error,
            advice(run_dir, mode, project),
        )
        return EXIT_UNSENT
    return EXIT_SENT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
