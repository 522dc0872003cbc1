"""Configs that name a class of one's own: what they hold of it, and what is left out where it is read again."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from hydra.errors import ConfigError
from scripts.comparison import ComparisonConfig
from scripts.config import TrainingConfig
from scripts.launch import write_config_once
from scripts.planning import forecast

EXAMPLES = Path(__file__).parents[3] / "notebooks" / "examples" / "attention_classes"


@pytest.fixture
def convolution(tmp_path: Path) -> str:
    return f"{shutil.copy(EXAMPLES / 'convolution.py', tmp_path)}:ConvolutionMixer"


def test_a_config_holds_hash_and_options_and_asks_only_for_the_path(convolution: str) -> None:
    config = TrainingConfig.preset("tiny", attention=convolution, attention_options={"kernel_size": 2})
    (record,) = config.attention_code.values()
    assert len(record["sha256"]) == 64
    assert record["options"] == {"ConvolutionMixer": {"kernel_size": 8}}
    assert convolution in config.papermill_arguments()
    assert not any("sha256" in argument for argument in config.papermill_arguments())
    assert "sha256" not in config.question()
    assert config.model_spec(257).attention_code == config.attention_code


def test_a_wrong_option_or_path_is_named(convolution: str) -> None:
    with pytest.raises(ConfigError, match=r"attention, attention_options: .*did you mean 'kernel_size'"):
        TrainingConfig.preset("tiny", attention=f"{convolution}(kernel_sise=3)")
    with pytest.raises(ConfigError, match=r"attention, attention_options: .*No such file"):
        TrainingConfig.preset("tiny", attention="nowhere.py:Mine")


def test_a_comparison_holds_the_code_of_all_its_arms(convolution: str) -> None:
    path = Path(convolution.split(":")[0])
    config = ComparisonConfig(arms=(f"{convolution}(kernel_size=2)", f"{convolution}, gqa(n_kv_heads=1)"))
    assert list(config.attention_code) == [str(path)]
    text, before = config.to_json(), config.attention_code[str(path)]["sha256"]
    path.write_text(path.read_text() + "\n# new\n")
    again = ComparisonConfig.from_json(text)
    assert again == config
    arm = again.training_config(again.arms[0])
    assert arm.attention_code[str(path)]["sha256"] == before
    assert not any("sha256" in argument for argument in config.papermill_arguments())
    with pytest.raises(ConfigError, match="must hold the SHA-256 and options"):
        ComparisonConfig.from_json(text.replace(str(path) + '": {', 'other.py": {'))


def test_a_copy_of_the_code_is_there_whole_or_not_at_all(
    convolution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of it would be refused as another file, whenever the run is started again."""
    config = TrainingConfig.preset("tiny", attention=convolution, data_dir=str(tmp_path))

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "the disk went away")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="the disk went away"):
            write_config_once(config, tmp_path / "run")
    assert list((tmp_path / "run" / "code").iterdir()) == []
    write_config_once(config, tmp_path / "run")
    assert (tmp_path / "run" / "code" / "convolution.py").is_file()


def test_memory_of_a_plan_of_several_kinds_is_planned(convolution: str, tmp_path: Path) -> None:
    """Blocks of one kind share what a compiled block was found to allocate; those of another kind do not."""
    config = TrainingConfig.preset("tiny", attention=f"{convolution}, gqa", compile_from_step=1, data_dir=str(tmp_path))
    assert forecast(config).memory.prediction.total > 0
