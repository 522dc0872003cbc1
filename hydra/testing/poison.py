"""Memory that is NaN until it is written, so that reading what nobody wrote cannot pass a test."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def nan_poisoned_memory() -> Iterator[None]:
    """While the fixture lives, torch.empty and its kin return NaN (largest value for integers)."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling  # type: ignore[attr-defined]
