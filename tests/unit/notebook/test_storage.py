import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import PapermillIO, local_file_io_cwd, papermill_io, write_ipynb

from hydra.notebook.storage import make_local_saves_atomic, save_copy

# Saves the same notebook for ever, so that a kill comes in the middle of a save sooner or later.
SAVE_FOR_EVER = """
import sys, nbformat
from papermill.iorw import write_ipynb
if sys.argv[2] == "atomic":
    from hydra.notebook.storage import make_local_saves_atomic
    make_local_saves_atomic()
nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_raw_cell("x" * 3_000_000)])
write_ipynb(nb, sys.argv[1])
print("saved", flush=True)
while True:
    write_ipynb(nb, sys.argv[1])
"""


@pytest.fixture()
def atomic_io(monkeypatch: pytest.MonkeyPatch) -> PapermillIO:
    handlers = [(scheme, type(handler)() if scheme == "local" else handler) for scheme, handler in papermill_io._handlers]
    monkeypatch.setattr(papermill_io, "_handlers", handlers)
    make_local_saves_atomic()
    return papermill_io


@pytest.mark.parametrize("kind", ["atomic", "papermill"])
def test_a_kill_in_the_middle_of_a_save(tmp_path: Path, kind: str) -> None:
    """The control, papermill's own save, is caught with half a notebook within the same number of kills."""
    path = tmp_path / "nb.ipynb"
    torn = 0
    for attempt in range(4):
        saver = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, str(path), kind], stdout=subprocess.PIPE)
        assert saver.stdout is not None
        assert saver.stdout.readline() == b"saved\n"
        try:
            saver.wait(0.05 + 0.013 * attempt)
        except subprocess.TimeoutExpired:
            os.kill(saver.pid, signal.SIGKILL)
        saver.communicate()
        try:
            nbformat.read(path, as_version=4)
        except ValueError:
            torn += 1
        if kind == "papermill" and torn:
            break
    assert torn == (0 if kind == "atomic" else 1)


def test_a_save_that_fails_leaves_the_old_notebook(
    atomic_io: PapermillIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "folder" / "nb.ipynb"
    write_ipynb(nbformat.v4.new_notebook(), str(path))
    old = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        write_ipynb(nbformat.v4.new_notebook(metadata={"a": 1}), str(path))
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_paths_are_relative_to_where_papermill_was_called(atomic_io: PapermillIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with local_file_io_cwd():
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        write_ipynb(nbformat.v4.new_notebook(), "nb.ipynb")
    assert (tmp_path / "nb.ipynb").exists()


def test_the_copy_is_left_out_where_it_would_be_the_original(tmp_path: Path) -> None:
    nb = nbformat.v4.new_notebook()
    save_copy(nb, tmp_path / "a.ipynb", f"{tmp_path}/./a.ipynb")
    assert not (tmp_path / "a.ipynb").exists()
    save_copy(nb, tmp_path / "runs" / "a.ipynb", f"{tmp_path}/b.ipynb")
    assert nbformat.read(tmp_path / "runs" / "a.ipynb", as_version=4) == nb
    save_copy(nb, tmp_path / "c.ipynb", None)
    assert (tmp_path / "c.ipynb").exists()
