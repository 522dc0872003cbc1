"""The papermill engine: everything is checked before anything starts, and what is left behind afterwards is true.

A subclass says what a parameter may be (`plan`); this module never learns what a config is. papermill's command exits
with 0 when the run is done, 1 when it failed, 2 when what was asked for cannot be run (nothing was started or
written), 75 when it was cut off, or is executed by another process already, and the same command goes on.
"""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from types import FrameType
from typing import ClassVar

import click
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from papermill.engines import Engine
from papermill.exceptions import PapermillExecutionError
from papermill.log import logger

from hydra.errors import ConfigError, HydraError, RunCutOffError
from hydra.notebook.doors import STANDARD_OUTPUT
from hydra.notebook.endings import FAILED, REJECTED, RESUMABLE, BatchError, NotSavedError
from hydra.notebook.interruption import Interruption
from hydra.notebook.kernel import BatchClient, TruthfulManager
from hydra.notebook.outputs import MAX_SHOWN_ERRORS, shorten
from hydra.notebook.parameters import (
    RUN_DIR,
    assigned_parameters,
    check_names,
    read_parameters,
    resolve_run_dir,
    secret_parameters,
)
from hydra.notebook.plan import TRAINING, Plan, Request
from hydra.notebook.progress import Progress
from hydra.notebook.storage import NotebookInUseError, make_saves_safe, mask_notebook, own_notebook, save_copy
from hydra.runtime import Run, RunStatus
from hydra.runtime.paths import refuse_links_out
from hydra.runtime.processes import ENGINE_PID, ENGINE_RUN_DIR
from hydra.runtime.secrets import mark, mask, refuse_secrets

START_TIMEOUT_S = 180
IOPUB_TIMEOUT_S = 120
STOP_TIMEOUT_S = 30.0
# sys.exit() in a cell ends the notebook early and is no failure, to papermill as to Python.
CLEAN_EXITS = (("SystemExit", ""), ("SystemExit", "0"))


class NotebookEngine(Engine):
    """Base of an engine; a subclass gives its name and `plan`."""

    engine_name: ClassVar[str]

    @classmethod
    def plan(cls, request: Request) -> Plan:
        """Check all that can be checked without starting or writing anything.

        Raises:
            HydraError: what is asked for cannot be run.
        """
        raise NotImplementedError

    @classmethod
    def execute_notebook(
        cls,
        nb: NotebookNode,
        kernel_name: str,
        output_path: str | None = None,
        progress_bar: bool = True,
        log_output: bool = False,
        autosave_cell_every: int = 30,
        **options: object,
    ) -> NotebookNode:
        """Check, execute, report. Called by papermill, with its own options.

        Raises:
            BatchError: see `exit_code`.
        """
        try:
            request = _read_request(nb)
            refuse_links_out(request.run_dir)
            plan = cls.plan(request)
            KernelSpecManager().get_kernel_spec(kernel_name)
        except HydraError as error:
            raise BatchError(str(error), REJECTED) from error
        except NoSuchKernel as error:
            raise BatchError(f"kernel must be an installed one, but there is no {error.name!r}", REJECTED) from error
        make_saves_safe()
        logger.addFilter(_mask_record)
        manager = TruthfulManager(
            nb,
            output_path=output_path,
            log_output=log_output,
            progress_bar=False,
            autosave_cell_every=autosave_cell_every,
        )
        try:
            with own_notebook(plan.run_dir, plan.notebook_name):
                return _Batch(plan, manager).execute(kernel_name, shows_progress=bool(progress_bar), options=options)
        except NotebookInUseError as error:
            raise BatchError(f"{error}: {plan.command}", RESUMABLE) from error


class _Batch:
    """One execution of one notebook."""

    def __init__(self, plan: Plan, manager: TruthfulManager) -> None:
        self._plan = plan
        self._manager = manager
        self._nb: NotebookNode = manager.nb
        self._run = Run(plan.run_dir)
        self._ended_at_before = self._run.status().ended_at
        self._interruption = Interruption()
        self._failure: str | None = None
        self._not_saved: NotSavedError | None = None
        self._status_at_failure: RunStatus | None = None

    def execute(self, kernel_name: str, *, shows_progress: bool, options: dict[str, object]) -> NotebookNode:
        """Execute the cells; then, however that ended, leave everything in a true state."""
        with self._interruption:
            try:
                with Progress(self._run, len(self._nb.cells), shown=shows_progress) as progress:
                    self._manager.notebook_start()
                    self._execute_cells(kernel_name, progress, **options)  # type: ignore[arg-type]
            except BaseException as error:
                self._abort(error)
                self._conclude(error)
                raise
            self._conclude(None)
        return self._nb

    def _execute_cells(
        self,
        kernel_name: str,
        progress: Progress,
        *,
        input_path: str | None = None,
        start_timeout: int = 0,
        execution_timeout: int | None = None,
        **traits: object,
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="hydra-", ignore_cleanup_errors=True) as socket_directory:
            client = BatchClient(
                self._manager,
                socket_directory=Path(socket_directory),
                on_cell=progress.begin_cell,
                on_abort=self._abort,
                kernel_name=kernel_name,
                timeout=execution_timeout,
                startup_timeout=max(START_TIMEOUT_S, start_timeout),
                iopub_timeout=IOPUB_TIMEOUT_S,
                store_widget_state=False,
                log=logger,
                log_output=self._manager.log_output,
                **traits,
            )
            job = {ENGINE_RUN_DIR: str(self._plan.run_dir), ENGINE_PID: str(os.getpid())}
            client.execute(env={**os.environ, **job})

    def _abort(self, error: BaseException) -> tuple[str, str]:
        """Why the execution cannot go on, as an error's name and text. The first call counts."""
        self._interruption.disarm()
        match error:
            case DeadKernelError():
                name, text = "KernelDied", "the kernel was killed, or ended by itself"
            case CellTimeoutError():
                name, text = "CellTimeout", "the cell took longer than --execution-timeout allows"
            case CellExecutionError():
                name, text = error.ename, error.evalue
            case NotSavedError():
                name, text = "NotSaved", str(error)
            case _:
                name, text = type(error).__name__, str(error)
        self._note_failure(name, text)
        return name, text

    def _note_failure(self, name: str, text: str) -> None:
        if self._failure is None and (name, text) not in CLEAN_EXITS:
            self._failure = f"{name}: {shorten(text, MAX_SHOWN_ERRORS)}"
            self._status_at_failure = self._run.status()

    def _note_cell_error(self) -> None:
        for cell in self._nb.cells:
            for output in cell.get("outputs", []):
                if output.output_type == "error":
                    self._note_failure(output.ename, output.evalue)

    def _stop_own_run(self) -> None:
        """End the trainer that this job started, with a checkpoint. (It also ends by itself when the kernel dies.)

        A run that someone else trains is only watched here, and goes on when this job ends.
        """
        status = self._run.status()
        if not status.is_alive or not _was_started_by_this_job(status.pid):
            return
        try:
            self._run.stop(STOP_TIMEOUT_S)
        except HydraError as error:
            logger.warning("%s", error)

    def _conclude(self, error: BaseException | None) -> None:
        """Save the notebook, end what this job started, write the report; then say how it went.

        Returns when all is well, or when `error` itself is the best account of it. What cannot be saved does not keep
        the rest from being saved.
        """
        # papermill.execute imports papermill.engines, and that imports this module: at the top it is not there yet.
        from papermill.execute import raise_for_execution_errors

        from hydra.notebook.report import render_report

        self._interruption.disarm()
        self._note_cell_error()
        # Also when all is well: a notebook that did not wait for its run must not leave it to the kernel's end.
        self._stop_own_run()
        mask_notebook(self._nb)
        plan, output_path = self._plan, self._nb.metadata.papermill["output_path"]
        report, cause = None, error
        self._not_saved = error if isinstance(error, NotSavedError) else None
        with self._noting_not_saved():
            self._manager.notebook_complete(failed=self._failure is not None)
        try:
            with self._noting_not_saved():
                report = render_report(self._nb, plan, self._failure)
            if error is None:
                with self._noting_not_saved():
                    raise_for_execution_errors(self._nb, output_path)
        except PapermillExecutionError as cell_error:
            cause = cell_error
        finally:
            with self._noting_not_saved():
                save_copy(self._nb, plan.run_dir / f"{plan.notebook_name}.ipynb", output_path)
        self._tell(cause, report)

    @contextlib.contextmanager
    def _noting_not_saved(self) -> Iterator[None]:
        try:
            yield
        except NotSavedError as refused:
            self._not_saved = self._not_saved or refused
            self._note_failure("NotSaved", str(refused))

    def _tell(self, cause: BaseException | None, report: Path | None) -> None:
        """Print that all is well, or raise what is to be told; return when `cause` itself tells it best."""
        if self._not_saved is not None:
            refused = str(self._not_saved)
            told = [self._failure] if self._failure and refused not in self._failure else []
            told += [f"{refused}: {self._plan.command}", *([f"report: {_shown(report)}"] if report else [])]
            raise BatchError("\n".join(told), FAILED) from cause
        assert report is not None
        if cause is None:
            self._say_all_is_well(report, to_stderr=self._nb.metadata.papermill["output_path"] == STANDARD_OUTPUT)
        elif self._was_cut_off(cause):
            raise self._cut_off(report) from cause
        elif isinstance(cause, PapermillExecutionError | CellTimeoutError):
            raise BatchError(f"{self._failure}\nreport: {_shown(report)}", FAILED) from cause

    def _cut_off(self, report: Path) -> BatchError:
        status = self._run.status()
        goes_on = f"The run goes on as process {status.pid}" if status.is_alive else "The same command goes on"
        return BatchError(f"{self._failure}\n{goes_on}: {self._plan.command}\nreport: {_shown(report)}", RESUMABLE)

    def _say_all_is_well(self, report: Path, *, to_stderr: bool) -> None:
        from hydra.notebook.report import JOBS

        status = self._run.status()
        if status.status not in ("done", "queued"):
            raise BatchError(
                f"the notebook ended, but its run is {status.status} at {status.unit} {status.step} of "
                f"{status.max_steps}\n"
                f"The same command goes on: {self._plan.command}\nreport: {_shown(report)}",
                FAILED if status.status == "failed" else RESUMABLE,
            )
        for line in [*JOBS[self._plan.job].lines(self._run), f"report: {_shown(report)}"]:
            click.echo(line, err=to_stderr)

    def _was_cut_off(self, error: BaseException) -> bool:
        """Whether the same command goes on where this one ended."""
        status = self._run.status()
        if status.status == "failed" and status.ended_at != self._ended_at_before:
            return False
        if isinstance(error, DeadKernelError | KeyboardInterrupt):
            return True
        assert self._status_at_failure is not None
        if isinstance(error, CellTimeoutError):
            return status.status == "interrupted"
        # A cell's error is the run's when the run had been cut off by then; else it is the notebook's own.
        is_told = (self._failure or "").startswith(RunCutOffError.__name__)
        return is_told or self._status_at_failure.status == "interrupted"


def _was_started_by_this_job(pid: int | None) -> bool:
    """Whether our kernel started that process, which then has our mark in its environment."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or of another user
        return False
    return f"{ENGINE_PID}={os.getpid()}".encode() in environment


def silence_unknown_parameters(engine_name: str) -> None:
    """Keep papermill from logging "Passed unknown parameter" when `engine_name` executes the notebook.

    It logs this for every name that the parameters cell does not assign, before the engine is called; the engine
    checks names strictly, so that the line is always wrong.
    """

    def is_welcome(record: logging.LogRecord) -> bool:
        if not record.getMessage().startswith("Passed unknown parameter"):
            return True
        from papermill.execute import execute_notebook

        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code is not execute_notebook.__code__:
            frame = frame.f_back
        return frame is None or frame.f_locals["engine_name"] != engine_name

    logger.addFilter(is_welcome)


def _mask_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = mask(record.getMessage()), ()
    return True


def _shown(path: Path) -> str:
    return os.path.relpath(path)


def _read_request(nb: NotebookNode) -> Request:
    record = nb.metadata.papermill
    check_names(list(record.get("parameters", {})))
    parameters = assigned_parameters(nb)
    secret_names, secrets = secret_parameters(nb)
    mark(secrets)
    notebook = record.get("input_path")
    name = PurePath(notebook).stem if isinstance(notebook, str) else None
    given = parameters.pop(RUN_DIR, None)
    job = str(nb.metadata.get("hydra", {}).get("job", TRAINING))
    run_dir = resolve_run_dir(given, name)
    output = record.get("output_path")
    refuse_secrets({RUN_DIR: str(run_dir), "the output's path": output})
    if isinstance(output, str) and output != STANDARD_OUTPUT:
        _check_output(Path(output).resolve(), notebook, run_dir, is_given=given is not None)
    return Request(
        notebook=str(notebook),
        notebook_name=name or run_dir.name,
        parameters={name: value for name, value in parameters.items() if name not in secret_names},
        secrets=tuple(sorted(secret_names)),
        run_dir=run_dir,
        job=job,
        reads_parameters=any(cell.cell_type == "code" and read_parameters.__name__ in cell.source for cell in nb.cells),
    )


def _check_output(output: Path, notebook: object, run_dir: Path, *, is_given: bool) -> None:
    """Return if the executed notebook may be saved there.

    Raises:
        ConfigError: it would replace the notebook itself, or lies in a run directory that is not this run's.
    """
    if isinstance(notebook, str) and output == Path(notebook).resolve():
        raise ConfigError(f"the output must not be the notebook itself, but both are {notebook}; give another output")
    if not is_given and output.parent != run_dir and output.parent.parent == run_dir.parent:
        raise ConfigError(
            f"the output lies in {output.parent}, but the run would be {run_dir}; to name the run, add: "
            f"-r {RUN_DIR} {_shown(output.parent)}"
        )
