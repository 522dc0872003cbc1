"""What a cell may leave in the notebook."""

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_output

from hydra.notebook.outputs import Share

SECRET = "hf_q8Wn-4Tz7Kd1"
N_BYTES = 1000


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)


def printed(outs: list[NotebookNode]) -> str:
    return "".join(out.text for out in outs if out.output_type == "stream")


def error_of(text: str) -> NotebookNode:
    return new_output("error", ename="ValueError", evalue=text, traceback=[text])


@pytest.mark.parametrize("n_seen", range(1, len(SECRET)))
@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("before", ["stderr", "stdout"])
def test_no_part_of_a_secret_is_left_at_the_cut(n_seen: int, pieces: int, before: str) -> None:
    share, outs = Share(N_BYTES), list[NotebookNode]()
    share.add_stream(outs, before, "x" * (N_BYTES - n_seen))
    length = -(-len(SECRET) // pieces)
    for start in range(0, len(SECRET), length):
        share.add_stream(outs, "stdout", SECRET[start : start + length])
    share.add_stream(outs, "stdout", "y" * 100)
    text = printed(outs)
    assert text.startswith("x" * (N_BYTES - n_seen))
    assert SECRET[:3] not in text
    assert "x" + SECRET[:1] not in text
    assert "HYDRA cut" in text


def test_nor_where_a_picture_is_what_is_cut() -> None:
    share, outs = Share(N_BYTES), list[NotebookNode]()
    share.add_stream(outs, "stdout", "x" * (N_BYTES - 8) + SECRET[:8])
    assert not share.has_room_for({"data": {"image/png": "iVBORw0"}, "metadata": {}}, outs)
    assert SECRET[:1] not in outs[0].text


def test_a_progress_bar_takes_the_room_of_what_it_shows() -> None:
    share, outs = Share(N_BYTES), list[NotebookNode]()
    for step in range(1000):
        share.add_stream(outs, "stderr", f"\rstep {step:>4} of 1000 [{'#' * (step // 50):<20}]")
    share.add_stream(outs, "stderr", "\n" + "z" * 900)
    text = printed(outs)
    assert text.startswith("step  999 of 1000")
    assert text.count("z") == 900
    assert "HYDRA cut" not in text
    share.add_stream(outs, "stderr", "z" * 100)
    assert len(outs[0].text.encode()) == N_BYTES
    assert "bytes more" in printed(outs)


def test_what_describes_a_display_counts_too() -> None:
    share, outs = Share(N_BYTES), list[NotebookNode]()
    assert not share.has_room_for({"data": {"text/plain": "x"}, "metadata": {"note": "y" * N_BYTES}}, outs)
    assert "HYDRA cut" in printed(outs)


def test_many_errors_leave_a_beginning_and_the_last() -> None:
    share, outs = Share(N_BYTES), list[NotebookNode]()
    for number in range(100):
        share.add_error(outs, error_of(f"{number} " + "x" * 80))
    errors = [out.evalue.split()[0] for out in outs if out.output_type == "error"]
    assert errors == ["0", "1", "2", "99"]
    assert "HYDRA cut" in printed(outs)


def test_what_is_printed_after_an_error_for_which_there_was_no_room() -> None:
    share, outs = Share(N_BYTES), list[NotebookNode]()
    share.add_stream(outs, "stdout", "x" * 900)
    share.add_error(outs, error_of("y" * 500))
    share.add_stream(outs, "stdout", "z" * 50)
    assert "z" not in printed(outs)
    assert "50 bytes more" in printed(outs)


def test_an_error_after_the_cut_is_seen() -> None:
    share, outs = Share(N_BYTES), list[NotebookNode]()
    share.add_stream(outs, "stdout", "x" * 2 * N_BYTES)
    share.add_error(outs, error_of("what went wrong"))
    assert outs[-1].evalue == "what went wrong"
