"""The generators that a step may draw from (Python's, numpy's, torch's), in memory and in a checkpoint."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The states of the global generators at one moment; of CUDA devices only where CUDA is in use."""

    python: Any
    numpy: Any
    torch_cpu: Tensor
    torch_cuda: list[Tensor]

    @classmethod
    def now(cls) -> "RandomState":
        """What the generators are in at this moment."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Put the generators back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch_cpu)
        for index, state in enumerate(self.torch_cuda):
            torch.cuda.set_rng_state(state, index)

    def to_tensors(self) -> dict[str, Tensor]:
        """Without pickle: `python` int64 [625], `numpy` int64 [626] (key, position, whether a second normal number is
        there), `python_next_gauss` float64 [0 or 1], `numpy_next_gauss` float64 [1], `torch_cpu` and
        `torch_cuda_<index>` uint8.
        """
        _, numbers, next_gauss = self.python
        _, key, position, has_gauss, numpy_gauss = self.numpy
        return {
            "python": torch.tensor(numbers, dtype=torch.int64),
            "python_next_gauss": torch.tensor([] if next_gauss is None else [next_gauss], dtype=torch.float64),
            "numpy": torch.tensor([*key.tolist(), position, has_gauss], dtype=torch.int64),
            "numpy_next_gauss": torch.tensor([numpy_gauss], dtype=torch.float64),
            "torch_cpu": self.torch_cpu,
            **{f"torch_cuda_{index}": state for index, state in enumerate(self.torch_cuda)},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "RandomState":
        """What `to_tensors` gave. (Checkpoints of before had torch's generator alone: the others stay as they are.)"""
        state = cls.now()
        if "python" in tensors:
            next_gauss = tensors["python_next_gauss"].tolist()
            *key, position, has_gauss = tensors["numpy"].tolist()
            python = (3, tuple(tensors["python"].tolist()), next_gauss[0] if next_gauss else None)
            words = np.array(key, dtype=np.uint32)
            numpy_state = ("MT19937", words, position, has_gauss, float(tensors["numpy_next_gauss"]))
            state = cls(python, numpy_state, state.torch_cpu, state.torch_cuda)
        cuda = [tensors[name] for name in sorted(tensors, key=_device_index) if name.startswith("torch_cuda_")]
        return cls(state.python, state.numpy, tensors["torch_cpu"], cuda)


def _device_index(name: str) -> int:
    return int(name.removeprefix("torch_cuda_")) if name.startswith("torch_cuda_") else -1


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
