"""Pre-training without a notebook is the same run."""

from pathlib import Path

import pytest

from hydra.errors import ConfigError
from scripts.train_pretrain import main, pretrain


def test_pretrain_trains_and_then_knows_that_it_is_done(
    tmp_path: Path, corpus_dir: Path, shared_data_dir: Path
) -> None:
    parameters = {"preset": "tiny", "threads": 1, "corpus": str(corpus_dir), "data_dir": str(shared_data_dir)}
    result = pretrain(tmp_path / "run", **parameters)
    assert (result.status, result.step) == ("done", 20)
    assert result.val_bits_per_byte is not None
    assert 0 < result.val_bits_per_byte < 9
    assert pretrain(tmp_path / "run", **parameters) == result
    with pytest.raises(ConfigError, match="max_steps"):
        pretrain(tmp_path / "other", max_step=1)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["a", "b"]])
def test_there_are_no_flags(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage" in capsys.readouterr().err


def test_a_run_of_another_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "something").write_text("")
    assert main([str(tmp_path)]) == 2
