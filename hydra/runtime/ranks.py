"""Processes that train one model together, as torchrun starts them: each computes the gradient of some of the rows."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from torch import Tensor

from hydra.errors import ConfigError

# The others wait for the first one while it evaluates and writes.
PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class Ranks:
    """How many processes there are, and which this is. The first owns the run: it alone writes."""

    index: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> "Ranks":
        """The processes that torchrun has started together with this one; this one alone if it has not."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        import torch
        import torch.distributed

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
        return cls(torch.distributed.get_rank(), count)

    @property
    def is_first(self) -> bool:
        """Whether this process owns the run."""
        return self.index == 0

    def rows_of(self, n_rows: int) -> range:
        """Rows of a global batch of n_rows that are this process's.

        Raises:
            ConfigError: the batch cannot be shared equally.
        """
        if n_rows % self.count:
            raise ConfigError(
                f"batch_size must be a multiple of the number of processes, but got batch_size={n_rows} and "
                f"{self.count} processes; change either"
            )
        share = n_rows // self.count
        return range(self.index * share, (self.index + 1) * share)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over all processes; the order of addition is that of the ranks' ring."""
        if self.count == 1:
            return
        import torch.distributed
        from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

        listed = list(tensors)
        flat = _flatten_dense_tensors(listed)
        torch.distributed.all_reduce(flat)
        for tensor, total in zip(listed, _unflatten_dense_tensors(flat, listed), strict=True):
            tensor.copy_(total)

    def is_any(self, fact: bool) -> bool:
        """Whether it is true in any process."""
        import torch

        said = torch.tensor([float(fact)])
        self.add_up([said])
        return bool(said)

    def wait_for_all(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.barrier()
