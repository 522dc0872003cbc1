"""Attention classes that give nothing that could be looked at. `# here` marks the line that raises."""

import torch
from torch import Tensor, nn


class Raises(nn.Module):
    def __init__(self, spec) -> None:
        super().__init__()
        self.proj = nn.Linear(spec.d_model, spec.d_model)

    def forward(self, x: Tensor, places: Tensor, ids: Tensor) -> Tensor:
        return self.proj(x) / divide(0)


def divide(number: int) -> float:
    return 1 / number  # here: Raises


class GivesNaN(Raises):
    def forward(self, x: Tensor, places: Tensor, ids: Tensor) -> Tensor:
        return self.proj(x) * torch.nan


class IsTooNarrow(Raises):
    def forward(self, x: Tensor, places: Tensor, ids: Tensor) -> Tensor:
        return self.proj(x)[..., 1:]


class GivesATuple(Raises):
    def forward(self, x: Tensor, places: Tensor, ids: Tensor) -> tuple[Tensor, None]:
        return self.proj(x), None


class WidensNumbers(Raises):
    def forward(self, x: Tensor, places: Tensor, ids: Tensor) -> Tensor:
        return self.proj(x).cfloat()


class CannotBeBuilt(Raises):
    def __init__(self, spec) -> None:
        super().__init__(spec)
        self.more = nn.Linear(spec.d_modl, 3)  # here: CannotBeBuilt


class RaisesAtDocuments(Raises):
    def forward(self, x: Tensor, places: Tensor, ids: Tensor) -> Tensor:
        known = {0: 1}
        return self.proj(x) * known[int(ids.max())]  # here: RaisesAtDocuments


class TakesBlocksAndSeesTheNextToken(Raises):
    """Of 128 tokens."""

    def forward(self, x: Tensor, places: Tensor, ids: Tensor) -> Tensor:
        x_BCLD = x.unflatten(1, (-1, 128))
        return self.proj(x_BCLD.roll(-1, dims=2)).flatten(1, 2)


class MultipliesInFloat32(Raises):
    """It trains in float32 alone."""

    def forward(self, x: Tensor, places: Tensor, ids: Tensor) -> Tensor:
        return torch.eye(x.shape[1]) @ self.proj(x)


class LearnsOfItsPlace(Raises):
    """The second of three layers sees the next token."""

    def __init__(self, spec) -> None:
        super().__init__(spec)
        self.shift = -1 if (spec.layer_index, spec.n_layers) == (1, 3) else 0

    def forward(self, x: Tensor, places: Tensor, ids: Tensor) -> Tensor:
        return self.proj(x.roll(self.shift, dims=1))
