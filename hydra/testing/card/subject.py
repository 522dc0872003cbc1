"""Subject: the attention under test, whether a researcher's class or a backend; and how a smallest T is found.

B batch, T tokens, D model width.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hydra.attention import build_attention
from hydra.attention.base import AttentionBackend
from hydra.attention.code import CustomSpec
from hydra.errors import HydraError

CONSECUTIVE = range(1, 37)
LENGTHS = (*CONSECUTIVE, 63, 64, 65, 127, 128, 129)
"""Around what a class may cut its work into; the smallest T between two of them is searched for."""
CLOSE = 1e-9
"""Largest difference in float64, over the largest magnitude, that counts as rounding."""
CLOSE_SINGLE = 1e-4
"""The same where the layer itself computes something in float32."""
# What a class under test may raise: everything that is a mistake in code, and nothing that ends a process.
MISTAKES = (
    ArithmeticError, AssertionError, AttributeError, HydraError, LookupError, MemoryError, NameError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Finding:
    """One property that does not hold."""

    property: str
    what: str
    """What was seen, where."""
    smallest_t: int | None = None
    """The shortest sequence on which it was seen; None where length does not matter."""

    def __str__(self) -> str:
        at = "" if self.smallest_t is None else f" (smallest T = {self.smallest_t})"
        return f"{self.property}: {self.what}{at}"


class Subject:
    """Builds and runs the attention under test.

    Args:
        attention: a class with `__init__(spec)` and `forward(x_BTD, positions_BT, document_ids_BT)`, or the name of a
            backend.
        d_model, n_heads: of the layers.
        options: other than the defaults.
    """

    def __init__(self, attention: type | str, d_model: int, n_heads: int, options: Mapping[str, Any]) -> None:
        self.attention, self.d_model, self.n_heads, self.options = attention, d_model, n_heads, dict(options)
        self.name = attention if isinstance(attention, str) else attention.__qualname__
        self.layer: nn.Module | None = None
        self.is_stateful = False  # then every run gets a copy of its own, so that one mistake is not found as all
        self.is_single = False  # computes something in float32 whatever it is given
        self.broken: set[int] = set()  # lengths that do not run at all

    @property
    def is_backend(self) -> bool:
        """Whether it is one of ours, by name."""
        return isinstance(self.attention, str)

    def resized(self, d_model: int, n_heads: int) -> "Subject":
        """The same attention at another width."""
        return Subject(self.attention, d_model, n_heads, self.options)

    def build(self) -> nn.Module:
        """A layer as its __init__ makes it, on torch's default device and in its default dtype."""
        if isinstance(self.attention, str):
            return build_attention(self.attention, d_model=self.d_model, n_heads=self.n_heads, **self.options)
        spec = CustomSpec(
            d_model=self.d_model,
            n_heads=self.n_heads,
            name=self.name,
            sha256="",
            option_items=tuple({**getattr(self.attention, "options", {}), **self.options}.items()),
        )
        layer: nn.Module = self.attention(spec)
        return layer

    def build_random(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A layer none of whose parameters is at a special value.

        Matrices and kernels keep magnitudes; what __init__ gave to other parameters is moved a little.
        """
        torch.default_generator.manual_seed(0)
        layer = self.build().to(torch.float64)
        generator = torch.Generator().manual_seed(1)
        scaled = {
            id(module.weight) for module in layer.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
        }
        with torch.no_grad():
            for parameter in layer.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                if id(parameter) in scaled:
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(0.1 * noise)
        return layer.to(dtype).eval()

    def inputs(self, n_batch: int, n_tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """Standard normal activations (B, T, D)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n_batch, n_tokens, self.d_model, generator=generator, dtype=torch.float64).to(dtype)

    def run(
        self,
        x_BTD: Tensor,
        document_ids_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        layer: nn.Module | None = None,
    ) -> Tensor:
        """Outputs (B, T, D), from the float64 layer of this subject unless another is given."""
        if layer is None:
            self.layer = self.build_random() if self.layer is None else self.layer
            layer = copy.deepcopy(self.layer) if self.is_stateful else self.layer
        return run_layer(layer, x_BTD, document_ids_BT, positions_BT)

    def look_for_single(self) -> None:
        """Note whether something is computed in float32 when everything given is float64, as `.float()` has it."""
        layer, x_BTD = self.build_random(), self.inputs(1, self.usable(9))
        with torch.no_grad(), _Dtypes() as dtypes:
            run_layer(layer, x_BTD)
        self.is_single = dtypes.has_single

    def usable(self, n_tokens: int) -> int:
        """n_tokens, or the next length that is not known to be broken."""
        return next((n for n in range(n_tokens, n_tokens + 8) if n not in self.broken), n_tokens)

    def differs(self, actual: Tensor, expected: Tensor) -> bool:
        """Whether two tensors differ by more than rounding; NaN differs from everything."""
        return not bool(((actual - expected).abs() <= self._limit(expected)).all())

    def places(self, actual_TD: Tensor, expected_TD: Tensor) -> str:
        """Which tokens of one row differ, in words."""
        is_close_T = ((actual_TD - expected_TD).abs() <= self._limit(expected_TD)).all(dim=-1)
        changed = (~is_close_T).nonzero().flatten().tolist()
        return ", ".join(map(str, changed[:4])) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")

    def _limit(self, expected: Tensor) -> Tensor:
        return (CLOSE_SINGLE if self.is_single else CLOSE) * expected.abs().max().clamp(min=1e-6)


def run_layer(
    layer: nn.Module, x_BTD: Tensor, document_ids_BT: Tensor | None = None, positions_BT: Tensor | None = None
) -> Tensor:
    """`call_layer`, with torch's generator at the same place each time: chance is looked for elsewhere."""
    torch.default_generator.manual_seed(0)
    return call_layer(layer, x_BTD, document_ids_BT, positions_BT)


def call_layer(
    layer: nn.Module, x_BTD: Tensor, document_ids_BT: Tensor | None = None, positions_BT: Tensor | None = None
) -> Tensor:
    """layer(x, positions, documents), whichever of the two kinds of layer it is; both are (B, T), int64."""
    n_batch, n_tokens, _ = x_BTD.shape
    if positions_BT is None:
        positions_BT = torch.arange(n_tokens, device=x_BTD.device).expand(n_batch, n_tokens)
    if document_ids_BT is None:
        document_ids_BT = torch.zeros(n_batch, n_tokens, dtype=torch.int64, device=x_BTD.device)
    if isinstance(layer, AttentionBackend):
        return layer(x_BTD, positions_BT=positions_BT, document_ids_BT=document_ids_BT)
    return cast("Tensor", layer(x_BTD, positions_BT, document_ids_BT))


class _Dtypes(TorchDispatchMode):
    """Notes whether a float32 tensor of some size is made."""

    has_single = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32 and result.numel() > 1:
            self.has_single = True
        return result


def find_smallest(
    subject: Subject,
    property_name: str,
    look: Callable[[int], str | None],
    minimum: int = 1,
    maximum: int = LENGTHS[-1],
) -> list[Finding]:
    """The one finding of the shortest sequence on which `look` sees something; [] if there is none.

    `look(n_tokens)` says what it saw, or None. What the class raises there is a finding as well.
    """
    last = minimum - 1
    for n_tokens in LENGTHS:
        if not minimum <= n_tokens <= maximum or n_tokens in subject.broken:
            continue
        if look_safely(look, n_tokens):
            for shorter in sorted(set(range(last + 1, n_tokens + 1)) - subject.broken):
                what = look_safely(look, shorter)
                if what:
                    return [Finding(property_name, what, shorter)]
        last = n_tokens
    return []


def look_safely(look: Callable[[int], str | None], n_tokens: int) -> str | None:
    """look(n_tokens), or what was raised there."""
    try:
        return look(n_tokens)
    except MISTAKES as error:
        return describe(error)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"raises {type(error).__name__}: {lines[0][:160]}"
