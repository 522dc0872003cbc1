"""The kernel of a batch run: it cannot outlive papermill, talks through files, not ports, and its output is bounded."""

import asyncio
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_output, output_from_msg
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NotebookExecutionManager
from papermill.log import logger
from traitlets import Integer

from hydra.notebook.endings import NotSavedError
from hydra.notebook.outputs import MAX_OUTPUT_BYTES, MAX_SHOWN_ERRORS, Share, bound_error, left_out
from hydra.runtime.secrets import MaskedStream, mask

# sockaddr_un holds 108 bytes; jupyter_client appends "-ipc-5" to the connection file's stem.
MAX_SOCKET_PATH_BYTES = 107


class BatchKernelManager(AsyncKernelManager):
    """Starts a kernel that the operating system ends when papermill ends, however papermill ends."""

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        """The kernel's command, behind one that asks Linux for SIGKILL when the starting thread is gone."""
        command: list[str] = super().format_kernel_cmd(extra_arguments)
        if threading.current_thread() is not threading.main_thread():
            # A worker thread may end long before the kernel is done; ipykernel's own poller remains.
            return command
        return [sys.executable, "-P", "-m", "hydra.runtime.die_with_parent", "SIGKILL", str(os.getpid()), *command]


class TruthfulManager(NotebookExecutionManager):
    """papermill's record of cell and notebook status, without calling finished what never ran."""

    def cell_died(self, cell: NotebookNode, ename: str, evalue: str) -> None:
        """Record that `cell` was running when the kernel, its time or the job ended, and save."""
        status = cell.metadata.papermill
        status.update(status=self.FAILED, exception=True, end_time=self.now().isoformat())
        if cell.cell_type == "code":
            cell.setdefault("outputs", []).append(
                new_output("error", ename=ename, evalue=evalue, traceback=[f"{ename}: {evalue}"])
            )
        self.save()

    def autosave_cell(self) -> None:
        """Save while a cell is at work. One refused is no reason to lose that work: the cell's end saves again."""
        try:
            super().autosave_cell()
        except NotSavedError as error:
            logger.warning("%s; the cell goes on", error)
            self.last_save_time = self.now()

    def notebook_complete(self, failed: bool = False) -> None:
        """Record the end and save. After a failure the cells that never ran stay `pending`."""
        if not failed:
            super().notebook_complete()
            return
        self.end_time = self.now()
        notebook_status = self.nb.metadata.papermill
        notebook_status.update(
            exception=True,
            end_time=self.end_time.isoformat(),
            duration=(self.end_time - self.start_time).total_seconds(),
        )
        self.save()


class BatchClient(PapermillNotebookClient):
    """Executes the cells; tells `on_cell` which one begins, and `on_abort` why the execution ends early.

    `on_abort` is called while the kernel may still live, and returns the error's name and its text for the notebook.
    """

    clear_before_next_output: bool
    max_output_bytes = Integer(MAX_OUTPUT_BYTES, help="Bytes of output that one cell may leave in the notebook.")

    def __init__(
        self,
        nb_man: TruthfulManager,
        *,
        socket_directory: Path,
        on_cell: Callable[[int], None],
        on_abort: Callable[[BaseException], tuple[str, str]],
        **traits: object,
    ) -> None:
        """`traits` are those of nbclient's NotebookClient."""
        super().__init__(nb_man, kernel_manager_class=BatchKernelManager, **traits)
        for name in ("stdout_file", "stderr_file"):
            if traits.get(name):
                setattr(self, name, MaskedStream(traits[name]))  # type: ignore[arg-type]
        self._socket_directory = socket_directory
        self._kernel_errors = socket_directory / "kernel-stderr"
        self._on_cell = on_cell
        self._on_abort = on_abort
        self._shares: defaultdict[int, Share] = defaultdict(lambda: Share(self.max_output_bytes))

    def create_kernel_manager(self) -> AsyncKernelManager:
        """A manager whose kernel listens on Unix sockets: no port to race for, nothing on the network."""
        manager = super().create_kernel_manager()
        if len(os.fsencode(self._socket_directory / "kernel-ipc-5")) <= MAX_SOCKET_PATH_BYTES:
            manager.transport = "ipc"
            manager.connection_file = str(self._socket_directory / "kernel.json")
        else:
            self.log.warning(
                f"{self._socket_directory} is too long for Unix sockets: the kernel listens on local ports"
            )
        return manager

    def start_new_kernel(self, **options: object) -> None:
        """Start the process. What it writes itself is worth reading when it dies, and noise when it is told to end."""
        with self._kernel_errors.open("wb") as errors:
            super().start_new_kernel(stderr=errors, **options)

    def start_new_kernel_client(self, **options: object) -> object:
        """Wait until the kernel answers.

        Raises:
            DeadKernelError: it died before; nbclient calls that a RuntimeError, and only later deaths by this name.
        """
        try:
            return super().start_new_kernel_client(**options)
        except RuntimeError as error:
            if "Kernel died" in str(error):
                self._show_kernel_errors()
                raise DeadKernelError(str(error)) from error
            raise

    def papermill_execute_cells(self) -> None:
        """Execute the cells in order up to the first error, saving at every step."""
        for index, cell in enumerate(self.nb.cells):
            try:
                self._on_cell(index)
                self.nb_man.cell_start(cell, index)
                self.execute_cell(cell, index)
            except CellExecutionError as error:
                self._on_abort(error)
                self.nb_man.cell_exception(cell, cell_index=index, exception=error)
                self.nb_man.cell_complete(cell, cell_index=index)
                return
            except BaseException as error:
                if isinstance(error, DeadKernelError):
                    self._show_kernel_errors()
                self._cancel_tasks()
                self.nb_man.cell_died(cell, *self._on_abort(error))
                raise
            self.nb_man.cell_complete(cell, cell_index=index)

    def output(
        self, outs: list[NotebookNode], msg: dict, display_id: str | None, cell_index: int
    ) -> NotebookNode | None:
        """Take one output: streams are merged as they come, and a cell that has filled its share gets a last word.

        Streams are returned whole, for papermill's log and --stdout-file: what is kept there is not ours to cut.
        """
        if self.output_hook_stack[msg["parent_header"].get("msg_id")]:
            return super().output(outs, msg, display_id, cell_index)
        if self.clear_before_next_output:
            self.clear_before_next_output = False
            self.clear_output(outs, {**msg, "content": {"wait": False}}, cell_index)
        content = msg["content"]
        share = self._shares[cell_index]
        match msg["msg_type"]:
            case "error":
                error = output_from_msg({**msg, "content": bound_error(content)})
                share.add_error(outs, error)
                return error
            case "stream":
                share.add_stream(outs, content["name"], content["text"])
                return new_output("stream", name=content["name"], text=content["text"])
            case _ if not share.has_room_for(content, outs):
                return None
        return super().output(outs, msg, display_id, cell_index)

    def clear_output(self, outs: list[NotebookNode], msg: dict, cell_index: int) -> None:
        """Forget the cell's outputs, and what they took of its share; nbclient may put it off to the next output."""
        super().clear_output(outs, msg, cell_index)
        if not outs:
            self._shares.pop(cell_index, None)

    def _update_display_id(self, display_id: str, msg: dict) -> None:
        """Let what is displayed already change in its place, within the share of every cell that shows it."""
        content = msg["content"]
        old = {
            cell_index: [self.nb.cells[cell_index].outputs[place] for place in places]
            for cell_index, places in self._display_id_map.get(display_id, {}).items()
        }
        if not all(self._shares[index].has_room_to_exchange(outs, content) for index, outs in old.items()):
            content = {**content, **left_out(content, self.max_output_bytes)}
        for cell_index, outs in old.items():
            self._shares[cell_index].exchange(outs, content)
        super()._update_display_id(display_id, {**msg, "content": content})

    def _show_kernel_errors(self) -> None:
        sys.stderr.write(mask(self._kernel_errors.read_text(errors="replace"))[-MAX_SHOWN_ERRORS:])

    def _cancel_tasks(self) -> None:
        """End what still waits for the broken cell, so that it does not write into the notebook during clean-up."""
        loop = ensure_event_loop()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
