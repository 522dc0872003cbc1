"""Subject: the attention under test, whether a researcher's class or a backend; and how a smallest T is found.

B batch, T tokens, D model width.
"""

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hydra.attention import build_attention
from hydra.attention.base import AttentionBackend
from hydra.attention.code import MISTAKES, CustomSpec, describe_mistake
from hydra.attention.custom import build_module

CONSECUTIVE = range(1, 37)
LENGTHS = (*CONSECUTIVE, 63, 64, 65, 127, 128, 129)
"""Around what a class may cut its work into."""
CLOSE = 1e-9
"""Largest difference in float64, over the largest magnitude, that counts as rounding."""
CLOSE_SINGLE = 1e-4
"""The same where the layer itself computes something in float32."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One property that does not hold."""

    property: str
    what: str
    """What was seen, where."""
    smallest_t: int | None = None
    """The shortest sequence on which it was seen; None where length does not matter."""

    def brief(self) -> str:
        """What was seen, without the message and the text of the line of what was raised."""
        raised = re.fullmatch(r"(raises \w+): .*?(, at \S+)?( `.*`)?", self.what)
        return f"{raised[1]}{raised[2] or ''}" if raised else self.what

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
        layer_index, n_layers: what a class is told of its place.
        dtype: float64, or float32 for what is to be seen as it trains.
        lengths: of sequences that are looked at, ascending; the smallest T between two of them is searched for.
    """

    def __init__(
        self,
        attention: type | str,
        d_model: int,
        n_heads: int,
        options: Mapping[str, Any],
        *,
        layer_index: int = 0,
        n_layers: int = 1,
        dtype: torch.dtype = torch.float64,
        lengths: tuple[int, ...] = LENGTHS,
    ) -> None:
        self.attention, self.d_model, self.n_heads, self.options = attention, d_model, n_heads, dict(options)
        self.layer_index, self.n_layers, self.dtype, self.lengths = layer_index, n_layers, dtype, lengths
        self.name = attention if isinstance(attention, str) else attention.__qualname__
        self.layer: nn.Module | None = None
        self.is_stateful = False  # then every run gets a copy of its own, so that one mistake is not found as all
        self.is_single = dtype == torch.float32  # computes something in float32, perhaps whatever it is given
        self._failures: dict[int, Finding | None] = {}

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
            layer_index=self.layer_index,
            n_layers=self.n_layers,
            name=self.name,
            sha256="",
            option_items=tuple({**getattr(self.attention, "options", {}), **self.options}.items()),
        )
        return build_module(self.attention, spec)

    def build_random(self, dtype: torch.dtype | None = None) -> nn.Module:
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
        return layer.to(dtype or self.dtype).eval()

    def inputs(self, n_batch: int, n_tokens: int, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
        """Standard normal activations (B, T, D)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n_batch, n_tokens, self.d_model, generator=generator, dtype=torch.float64).to(
            dtype or self.dtype
        )

    def run(
        self,
        x_BTD: Tensor,
        document_ids_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        layer: nn.Module | None = None,
    ) -> Tensor:
        """Outputs (B, T, D), from the layer of this subject unless another is given."""
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

    def failure(self, n_tokens: int) -> Finding | None:
        """Why outputs of this length mean nothing, whatever they are asked; None if they may."""
        if n_tokens not in self._failures:
            with torch.no_grad():
                self._failures[n_tokens] = self._look_at_outputs(n_tokens)
        return self._failures[n_tokens]

    def failure_everywhere(self) -> Finding | None:
        """The failure of the shortest sequence, if outputs mean nothing at any length."""
        found = [self.failure(n_tokens) for n_tokens in self.lengths]
        return found[0] if all(found) else None

    def _look_at_outputs(self, n_tokens: int) -> Finding | None:
        x_BTD = self.inputs(2, n_tokens)
        try:
            out_BTD = self.run(x_BTD)
        except MISTAKES as error:
            return Finding("forward", self.describe(error), n_tokens)
        if not isinstance(out_BTD, Tensor):
            return Finding("output", f"gives no tensor but a {type(out_BTD).__name__}", n_tokens)
        if out_BTD.shape != x_BTD.shape:
            what = f"gives {tuple(out_BTD.shape)} for {tuple(x_BTD.shape)}"
            return Finding("output shape", what, n_tokens)
        if out_BTD.dtype != x_BTD.dtype:
            return Finding("output dtype", f"gives {out_BTD.dtype} for {x_BTD.dtype}", n_tokens)
        if not out_BTD.isfinite().all():
            return Finding("not finite", "gives NaN or infinity", n_tokens)
        return None

    def describe(self, error: BaseException) -> str:
        """What was raised, in one line, with the line of the attention's own code."""
        module = "hydra.attention.backends" if isinstance(self.attention, str) else self.attention.__module__
        return describe_mistake(error, module)

    def keeps_state(self) -> bool:
        """Whether a call gives something else after another call, at the shortest length that runs."""
        n_tokens = next(n_tokens for n_tokens in self.lengths if self.failure(n_tokens) is None)
        x_BTD = self.inputs(1, n_tokens)
        with torch.no_grad():
            out_BTD = self.run(x_BTD)
            self.run(self.inputs(1, n_tokens, seed=1))
            return not torch.equal(out_BTD, self.run(x_BTD))

    def usable(self, n_tokens: int) -> int:
        """n_tokens, or the next length that gives outputs."""
        return next((n for n in range(n_tokens, n_tokens + 8) if self.failure(n) is None), n_tokens)

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


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Layers are so small here that threads would wait for each other most of the time."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


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
    maximum: int | None = None,
) -> list[Finding]:
    """The one finding of the shortest sequence on which `look` sees something; [] if there is none.

    `look(n_tokens)` says what it saw, or None. What the class raises there is a finding as well. Lengths whose outputs
    mean nothing anyway are not looked at.
    """

    def look_safely(n_tokens: int) -> str | None:
        if subject.failure(n_tokens):
            return None
        try:
            return look(n_tokens)
        except MISTAKES as error:
            return subject.describe(error)

    last = minimum - 1
    for n_tokens in subject.lengths:
        is_asked = minimum <= n_tokens and (maximum is None or n_tokens <= maximum)
        if not is_asked or subject.failure(n_tokens):
            continue
        if look_safely(n_tokens):
            for shorter in range(last + 1, n_tokens + 1):
                what = look_safely(shorter)
                if what:
                    return [Finding(property_name, what, shorter)]
        last = n_tokens
    return []
