"""What was chosen once stays chosen, and what cannot be had is an error."""

from pathlib import Path

import pytest
import torch

from hydra.errors import ConfigError
from hydra.runtime import paths
from hydra.runtime.choices import check_device, choose_once


def test_the_first_session_decides_and_every_session_is_recorded(tmp_path: Path) -> None:
    first = choose_once(tmp_path, device="cpu", threads=1)
    again = choose_once(tmp_path, device="auto", threads=0)
    assert again == first
    environment = paths.read_json(tmp_path / paths.ENVIRONMENT)
    assert environment["resolved"] == {"device": "cpu", "threads": 1}
    assert [session["packages"]["torch"] for session in environment["sessions"]] == [torch.__version__] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error_and_never_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match="no GPU"):
            choose_once(tmp_path, device="cuda", threads=1)
    assert not (tmp_path / paths.ENVIRONMENT).exists()
    check_device("cpu")
    check_device("auto")
