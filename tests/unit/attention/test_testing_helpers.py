"""The helpers must be able to fail, or no test that uses them can."""

import pytest
import torch

from hydra.testing.poison import nan_poisoned_memory  # noqa: F401
from hydra.testing.tolerances import MAX_RELATIVE_ERROR, assert_close


def test_fresh_memory_is_poisoned(nan_poisoned_memory: None) -> None:  # noqa: F811
    assert torch.empty(5).isnan().all()
    assert torch.zeros(3).new_empty(5, dtype=torch.float64).isnan().all()


def test_poison_ends_with_the_test() -> None:
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", MAX_RELATIVE_ERROR, ids=str)
def test_closeness_has_an_end(dtype: torch.dtype) -> None:
    expected = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert_close(expected * (1 + 0.9 * MAX_RELATIVE_ERROR[dtype]), expected, dtype)
    with pytest.raises(AssertionError, match="must agree"):
        assert_close(expected * (1 + 1.1 * MAX_RELATIVE_ERROR[dtype]), expected, dtype)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(AssertionError, match="must agree"):
            assert_close(torch.tensor([1.0, bad]), expected, dtype)
    with pytest.raises(AssertionError):
        assert_close(expected[:1], expected, dtype)
