"""What is written in pieces is what the format's own library would write, and reads."""

import pytest
import torch
from safetensors.torch import load, save

from hydra.runtime import safetensors_format
from hydra.runtime.safetensors_format import DTYPES, safetensors_pieces


def written(tensors: dict[str, torch.Tensor]) -> bytes:
    return b"".join(safetensors_pieces(tensors))


def test_the_library_writes_the_same_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(7, 3, generator=generator) for name in ("b", "a", "ä/exp_avg")}
    assert written(tensors) == save(tensors)


@pytest.mark.parametrize("piece_bytes", [1, 7, 4096])
def test_the_library_reads_every_dtype_and_shape(monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(safetensors_format, "PIECE_BYTES", piece_bytes)
    shapes = {"number": (), "nothing": (0, 5), "odd": (3,), "matrix": (4, 5)}
    tensors = {
        f"{dtype}-{name}": torch.arange(max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()]
        .to(getattr(torch, dtype))
        .reshape(shape)
        for dtype in DTYPES
        for name, shape in shapes.items()
    }
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).T
    pieces = list(safetensors_pieces(tensors))
    assert max(map(len, pieces[1:])) <= max(piece_bytes, 8)
    loaded = load(b"".join(pieces))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_no_tensor_is_copied() -> None:
    weight = torch.zeros(3)
    *_, piece = safetensors_pieces({"weight": weight})
    weight[0] = 1.0
    assert bytes(piece) == bytes(weight.numpy().data)
