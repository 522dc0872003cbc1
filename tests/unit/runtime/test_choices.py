"""What was chosen once stays chosen, and what cannot be had is an error."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hydra.errors import ConfigError
from hydra.runtime import paths
from hydra.runtime.choices import check_device, choose_dtype, choose_once, settle


def test_the_first_session_decides_and_every_session_is_recorded(tmp_path: Path) -> None:
    first = choose_once(tmp_path, device="cpu", threads=1, dtype="float32", attention_kernel="blocked")
    again = choose_once(tmp_path, device="auto", threads=0, dtype="bfloat16", attention_kernel="scaled_dot_product")
    assert again == first
    environment = paths.read_json(tmp_path / paths.ENVIRONMENT)
    expected = {"device": "cpu", "threads": 1, "dtype": "float32", "attention_kernel": "blocked", "kernels": "torch"}
    not_planned_yet = {"micro_batch_size": 0, "activation_checkpointing": "none", "optimizer_offload": False}
    assert environment["resolved"] == {**expected, **not_planned_yet}
    settle(tmp_path, first, micro_batch_size=2, activation_checkpointing="full")
    planned = choose_once(tmp_path, device="cpu", threads=2, dtype="float32", attention_kernel="blocked")
    assert planned == replace(first, micro_batch_size=2, activation_checkpointing="full")
    environment = paths.read_json(tmp_path / paths.ENVIRONMENT)
    assert [session["packages"]["torch"] for session in environment["sessions"]] == [torch.__version__] * 3


def test_auto_is_resolved_and_the_reason_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        choices = choose_once(
            tmp_path,
            device="cpu",
            threads=0,
            dtype="auto",
            attention_kernel="auto",
            choose_attention_kernel=lambda device: (f"kernel of {device}", "it was made for it"),
            kernels="auto",
            choose_kernels=lambda device: (f"operators of {device}", "so was this"),
        )
    assert choices.attention_kernel == "kernel of cpu"
    assert choices.dtype == choose_dtype("cpu")[0]
    assert choices.kernels == "operators of cpu"
    assert "it was made for it" in caplog.text
    assert "so was this" in caplog.text
    assert choose_dtype("cpu")[1] in caplog.text


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "dtype"),
    [(True, True, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")],
)
def test_dtype_follows_the_processor(monkeypatch: pytest.MonkeyPatch, amx: bool, avx512_bf16: bool, dtype: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    assert choose_dtype("cpu")[0] == dtype


def test_runs_of_before_go_on_as_they_began(tmp_path: Path) -> None:
    """Their environment.json names neither dtype nor kernels: there was one of each."""
    paths.write_json(tmp_path / paths.ENVIRONMENT, {"resolved": {"device": "cpu", "threads": 3}, "sessions": []})
    choices = choose_once(
        tmp_path, device="auto", threads=0, dtype="auto", attention_kernel="blocked", kernels="triton"
    )
    assert (choices.threads, choices.dtype, choices.attention_kernel) == (3, "float32", "scaled_dot_product")
    assert choices.kernels == "torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error_and_never_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match="no GPU"):
            choose_once(tmp_path, device="cuda", threads=1)
    assert not (tmp_path / paths.ENVIRONMENT).exists()
    check_device("cpu")
    check_device("auto")
