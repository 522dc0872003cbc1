import errno
import os
import resource
import signal
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import LocalHandler, PapermillIO, local_file_io_cwd, papermill_io, write_ipynb

from hydra.notebook.endings import NotSavedError
from hydra.notebook.storage import make_saves_safe, save_copy


@pytest.fixture
def atomic_io(monkeypatch: pytest.MonkeyPatch) -> PapermillIO:
    handlers = [
        (scheme, LocalHandler() if scheme == "local" else handler) for scheme, handler in papermill_io._handlers
    ]
    monkeypatch.setattr(papermill_io, "_handlers", handlers)
    make_saves_safe()
    return papermill_io


def save_and_be_killed(nb: nbformat.NotebookNode, path: Path) -> None:
    """A process that the operating system kills in the middle of its save: no file may grow beyond 100 kB."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        write_ipynb(nb, str(path))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGXFSZ


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "nb.ipynb")
    return tmp_path / "nb.ipynb"


LARGE = nbformat.v4.new_notebook(cells=[nbformat.v4.new_raw_cell("x" * 3_000_000)])


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_notebook(atomic_io: PapermillIO, saved: Path) -> None:
    save_and_be_killed(LARGE, saved)
    assert nbformat.read(saved, as_version=4) == nbformat.v4.new_notebook()


def test_papermills_own_save_leaves_half_a_notebook(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without ours the same kill destroys it."""
    monkeypatch.setattr(papermill_io, "_handlers", [("local", LocalHandler())])
    save_and_be_killed(LARGE, saved)
    with pytest.raises(nbformat.reader.NotJSONError):
        nbformat.read(saved, as_version=4)


def test_a_save_that_fails_leaves_the_old_notebook(
    atomic_io: PapermillIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "folder" / "nb.ipynb"
    write_ipynb(nbformat.v4.new_notebook(), str(path))
    old = path.read_bytes()
    refused = OSError(errno.ENOSPC, "no space left")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(refused))
    with pytest.raises(NotSavedError, match=r"nb\.ipynb must be written, but the disk is full \(no space left\)"):
        write_ipynb(nbformat.v4.new_notebook(metadata={"a": 1}), str(path))
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_paths_are_relative_to_where_papermill_was_called(
    atomic_io: PapermillIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_saves_are_masked_and_the_notebook_that_is_executed_is_not(
    atomic_io: PapermillIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_API_KEY", 'can"ary\nsecond line')
    outputs = [nbformat.v4.new_output("stream", text='told: can"ary\nsecond line\n')]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(r'key = "can\"ary\nsecond line"', outputs=outputs)])
    before = nbformat.writes(nb)
    write_ipynb(nb, str(tmp_path / "saved.ipynb"))
    save_copy(nb, tmp_path / "copy.ipynb", None)
    write_ipynb(nb, "-")
    assert nbformat.writes(nb) == before
    printed = capsys.readouterr().out
    for text in ((tmp_path / "saved.ipynb").read_text(), (tmp_path / "copy.ipynb").read_text(), printed):
        (cell,) = nbformat.reads(text, as_version=4).cells
        assert (cell.source, cell.outputs[0].text) == ('key = "[masked]"', "told: [masked]\n")


def test_a_save_into_a_run_with_a_damaged_list_of_its_files_says_so(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text("garbage\n")
    with pytest.raises(NotSavedError, match=r"SHA256SUMS must be as it was written, .*put back a copy"):
        save_copy(nbformat.v4.new_notebook(), tmp_path / "nb.ipynb", None)
