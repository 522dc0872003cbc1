"""The rows of `make storm` about hostile inputs turn bad when something comes through, or when nothing was tried."""

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from diagnostics.hostile import HostileTally, ask_reader, check_report, offer
from diagnostics.storm import Tally
from hydra.runtime import Run
from hydra.runtime.checkpoint import list_checkpoints
from hydra.testing.hostile.files import READERS
from hydra.testing.hostile.pages import POLICY, VECTORS, mark_of
from scripts.config import TrainingConfig
from scripts.trainer import Trainer

TRIED = {"artifacts": 1, "reports": 1, "offered": 1}
PATTERN = "checkpoints/*/model.safetensors"


@pytest.mark.parametrize("bad", ["leaks", "live", "loads", "problems"])
def test_one_of_anything_is_one_too_many(bad: str) -> None:
    assert Tally(hostile=HostileTally(**TRIED)).is_good()
    tally = HostileTally(**TRIED, **{bad: ["it"]})
    assert not Tally(hostile=tally).is_good()
    assert tally.complaints() == ["it"]
    assert sum(value.startswith("1 ") for value in tally.rows().values()) == (bad != "problems")


@pytest.mark.parametrize("untried", TRIED)
def test_what_was_not_tried_is_not_good(untried: str) -> None:
    assert not HostileTally(**{**TRIED, untried: 0}).is_good()


@pytest.fixture(scope="module")
def trained(make_run: Callable[..., Path]) -> Path:
    run_dir = make_run("offered", max_steps=2, eval_every=2, sample_tokens=0)
    Trainer(TrainingConfig.from_json((run_dir / "config.json").read_text()), run_dir).train()
    return run_dir


def unpickle(run: Run) -> object:
    return pickle.loads((list_checkpoints(run.directory)[-1] / "model.safetensors").read_bytes())


def test_a_reader_that_unpickles_is_found(trained: Path) -> None:
    tally = HostileTally()
    offer(trained, "pickle", PATTERN, partial(ask_reader, unpickle), tally)
    assert (tally.offered, len(tally.loads), len(tally.problems)) == (1, 1, 1)


def test_a_reader_that_takes_what_it_should_not_is_found(trained: Path) -> None:
    tally = HostileTally()
    offer(trained, "pickle", PATTERN, partial(ask_reader, lambda run: None), tally)
    offer(trained, "overlapping tensors", PATTERN, partial(ask_reader, unpickle), tally)
    assert (tally.offered, len(tally.loads), len(tally.problems)) == (2, 0, 2)


def test_a_reader_that_refuses_is_not(trained: Path) -> None:
    tally = HostileTally()
    offer(trained, "pickle", PATTERN, partial(ask_reader, dict(READERS)[PATTERN]), tally)
    assert (tally.offered, tally.complaints()) == (1, [])


@pytest.mark.parametrize(
    ("body", "n_live"), [("", 0), (VECTORS[0], 1), ("<!-- a -->", 1), (VECTORS[4], 2), ("&lt;script&gt;", 0)]
)
def test_what_stands_in_a_report_is_found(tmp_path: Path, body: str, n_live: int) -> None:
    tally = HostileTally()
    page = f'<head><meta http-equiv="Content-Security-Policy" content="{POLICY}"></head><body>{body}'
    (tmp_path / "report.html").write_text(page + " ".join(map(mark_of, range(len(VECTORS)))))
    check_report(tmp_path / "report.html", tally)
    assert (tally.reports, tally.strings) == (1, len(VECTORS))
    assert (len(tally.live), tally.problems) == (n_live, [])


def test_a_report_that_hides_a_string_is_found(tmp_path: Path) -> None:
    tally = HostileTally()
    (tmp_path / "report.html").write_text("<body>" + " ".join(map(mark_of, range(len(VECTORS) - 1))))
    check_report(tmp_path / "report.html", tally)
    assert (tally.strings, len(tally.live), len(tally.problems)) == (len(VECTORS) - 1, 1, 1)
