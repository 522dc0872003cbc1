"""What the engine refuses before a kernel starts: damaged files of a run, folders that cannot be written."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import papermill  # noqa: F401  (the engine is found while papermill is imported, not before)
import pytest

from hydra.errors import ConfigError, RunError
from hydra.notebook.parameters import resolve_run_dir
from hydra.notebook.plan import COMPARISON, TRAINING, Plan, Request
from hydra.runtime import Run
from scripts.comparison import ComparisonConfig
from scripts.config import TrainingConfig
from scripts.launch import write_config_once
from scripts.papermill_engine import HydraEngine

README = str(Path(__file__).parents[3] / "README.md")
TINY: Mapping[str, object] = {"preset": "tiny", "corpus": README}


@pytest.fixture
def make_plan(tmp_path: Path) -> Callable[..., Plan]:
    """make_plan(job, name, **parameters): what the engine makes of a command in a folder of its own."""

    def make(job: str = TRAINING, name: str = "x", *, reads_parameters: bool = True, **parameters: object) -> Plan:
        given = {**TINY, "data_dir": str(tmp_path / "data"), **parameters}
        notebook = "notebooks/pretrain.ipynb"
        return HydraEngine.plan(
            Request(
                notebook=notebook,
                notebook_name="pretrain",
                parameters=given,
                run_dir=tmp_path / name,
                job=job,
                reads_parameters=reads_parameters,
            )
        )

    return make


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was started and has done nothing."""
    write_config_once(TrainingConfig.from_parameters({**TINY, "data_dir": str(tmp_path / "data")}), tmp_path / "x")
    return tmp_path / "x"


def test_what_a_notebook_makes_in_its_code_is_not_compared_by_its_parameters(
    make_plan: Callable[..., Plan], run_dir: Path
) -> None:
    """It goes on with its run of preset tiny, though what it says to papermill alone would be preset debug."""
    with pytest.raises(RunError, match="preset_name: 'tiny' there, 'debug' asked for"):
        make_plan(preset="debug")
    plan = make_plan(preset="debug", reads_parameters=False)
    assert (plan.config, plan.differences) == ({}, {})
    assert "debug" not in plan.question
    (run_dir / "config.json").unlink()
    (run_dir / "state.json").write_text("{}")
    with pytest.raises(RunError, match="which looks like one"):
        make_plan(reads_parameters=False)


@pytest.mark.parametrize("text", ["garbage", '{"a": ', "[1]", "\xff"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "state.json", "environment.json", "memory.json", "data.json", "results.json", "SHA256SUMS"],
)
def test_a_damaged_file_is_named_with_what_to_do(
    make_plan: Callable[..., Plan], run_dir: Path, name: str, text: str
) -> None:
    make_plan()
    (run_dir / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=f"{run_dir}/{name} must be as it was written, but is damaged") as caught:
        make_plan()
    assert "put back a copy of it" in str(caught.value) or "remove it" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state.json", {"steps": 3}),
        ("state.json", {"step": "three"}),
        ("state.json", {"status": "running"}),
        ("state.json", {"owner": {"pid": 3}}),
        ("memory.json", {"prediction": {}}),
        ("memory.json", {"a": 1}),
    ],
    ids=str,
)
def test_json_of_something_else_is_damage(
    make_plan: Callable[..., Plan], run_dir: Path, name: str, value: dict[str, object]
) -> None:
    (run_dir / name).write_text(json.dumps(value))
    with pytest.raises(RunError, match=f"{name} must be as it was written"):
        make_plan()


@pytest.mark.parametrize("line", [b"garbage", b"\xff\xfe", b"[1]", b'{"loss_nats": 1.0}'])
def test_a_damaged_line_is_named_by_its_number(make_plan: Callable[..., Plan], run_dir: Path, line: bytes) -> None:
    (run_dir / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl must be .*, but line 2 is damaged .*; remove that line"):
        make_plan()
    (run_dir / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line)  # a line that is still being written
    make_plan()


def test_a_tokenizer_that_is_damaged_or_missing_is_named(make_plan: Callable[..., Plan], run_dir: Path) -> None:
    with pytest.raises(RunError, match=r"tokenizer\.json must be as it was written"):
        Run(run_dir).load_tokenizer()
    (run_dir / "tokenizer.json").write_text("garbage")
    with pytest.raises(RunError, match=r"tokenizer\.json must be .*copy it from the folder in data_dir"):
        make_plan()


def test_a_stored_config_that_cannot_be_run_is_named_by_its_file(make_plan: Callable[..., Plan], run_dir: Path) -> None:
    stored = json.loads((run_dir / "config.json").read_text())
    (run_dir / "config.json").write_text(json.dumps({**stored, "max_steps": "many"}))
    with pytest.raises(RunError, match=r"config.json: max_steps"):
        make_plan()


@pytest.mark.parametrize("left", ["checkpoints", "state.json", "metrics.jsonl"])
def test_a_run_without_its_config_is_told_from_a_folder_of_something_else(
    make_plan: Callable[..., Plan], tmp_path: Path, left: str
) -> None:
    (tmp_path / "x" / left).mkdir(parents=True)
    with pytest.raises(RunError, match=r"config.json must be .* but it is missing from .*, which looks like") as caught:
        make_plan()
    message = str(caught.value)
    assert f"such as {tmp_path}/x-2" in message
    assert f"-r run_dir {tmp_path}/x-2" in message
    assert "runs/x" not in message
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    with pytest.raises(RunError, match=r"is no run and holds letter.txt; give another run_dir, such as .*/other-2\n"):
        make_plan(name="other")


@pytest.mark.parametrize("place", ["/proc/foo", "/sys/foo/bar", "/dev/null/x"])
def test_a_folder_in_which_nobody_can_write_is_named_by_its_parameter(
    make_plan: Callable[..., Plan], place: str
) -> None:
    with pytest.raises(ConfigError, match=r"^run_dir must .*; give another"):
        resolve_run_dir(place, None)
    with pytest.raises(ConfigError, match=r"^data_dir must .*; give another"):
        make_plan(data_dir=place)


def test_a_data_dir_may_be_a_folder_that_is_only_read(
    make_plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))  # root could write there

    (tmp_path / "data").mkdir()
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"data_dir must lie where one may write.*Permission denied"):
        make_plan()
    (tmp_path / "data" / ("a" * 64)).mkdir()
    (tmp_path / "data" / ("a" * 64) / "manifest.json").touch()
    make_plan()


def test_the_trainer_says_what_goes_on_with_a_comparison(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from scripts import trainer

    write_config_once(ComparisonConfig.from_parameters({"preset": "tiny", "arms": ["ccgqa"]}), tmp_path / "x")
    assert trainer.main([str(tmp_path / "x")]) == trainer.EXIT_BAD_CONFIG
    assert "x/config.json: this is a comparison, not a training run; python -m scripts.compare DIR" in caplog.text


@pytest.mark.parametrize("name", ["state.json", "results.json"])
def test_damage_in_the_folder_of_a_comparison_is_named(
    make_plan: Callable[..., Plan], tmp_path: Path, name: str
) -> None:
    given = {**TINY, "arms": ["ccgqa"], "data_dir": str(tmp_path / "data")}
    write_config_once(ComparisonConfig.from_parameters(given), tmp_path / "x")
    make_plan(COMPARISON, arms=["ccgqa"])
    (tmp_path / "x" / name).write_text("garbage")
    with pytest.raises(RunError, match=f"{name} must be as it was written"):
        make_plan(COMPARISON, arms=["ccgqa"])
    with pytest.raises(RunError, match=r"max_steps: the preset's there, 30 asked for"):
        make_plan(COMPARISON, arms=["ccgqa"], max_steps=30)


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"corpus": 5}, "-y '{corpus: [a, b]}'"),
        ({"attention_options": 5}, "-y '{attention_options: {key: value}}'"),
    ],
    ids=str,
)
def test_a_number_in_place_of_a_list_is_told_how_lists_are_given(
    make_plan: Callable[..., Plan], parameters: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(**parameters)
    assert told in str(caught.value)
