"""CustomAttention: a researcher's own class where a backend stands, with a cache that computes everything again.

B batch, T new tokens, S tokens so far, D model width.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from hydra.attention.base import AttentionBackend, AttentionCache, write_tokens
from hydra.attention.code import MISTAKES, CustomSpec, describe_mistake, load_class
from hydra.attention.masks import AttentionContext, TokenHistory
from hydra.errors import ConfigError, HydraError

MEASURED_LENGTHS = (256, 512, 1024)
"""Where floating-point operations are counted, which are then taken to be a n + b n^2."""


@dataclasses.dataclass
class RecomputeCache(AttentionCache):
    """Recompute cache: the inputs of the layer, all of which go through it again with every new token."""

    x_BSD: Tensor
    positions_BS: Tensor
    """int64."""

    def token_tensors(self) -> list[Tensor]:
        """Tensors with a place for each token."""
        return [self.x_BSD, self.positions_BS]


class CustomAttention(AttentionBackend):
    """Adapts a class with `forward(x_BTD, positions_BT, document_ids_BT)`: both are int64 of shape (B, T), always.

    Without documents, ids are zeros. Only parameters may hold values: the layer is built without memory, and what is
    not in its state dict is in no checkpoint.
    """

    spec: CustomSpec

    def __init__(self, spec: CustomSpec) -> None:
        super().__init__(spec)
        custom = build_module(load_class(spec.name, spec.sha256), spec)
        refuse_hidden_tensors(custom, spec.name)
        if next(custom.parameters(), None) is None:
            raise ConfigError(f"an attention class must have parameters, but {spec.name} has none")
        self.custom = custom

    def prepare(self, context: AttentionContext) -> AttentionContext:
        """See AttentionBackend.prepare. The class makes its own masks."""
        if "custom" not in context.shared:
            context.shared["custom"] = AttentionContext(context.n_past, context.positions_BT, context.document_ids_BS)
        return cast("AttentionContext", context.shared["custom"])

    def attend(self, x_BTD: Tensor, context: AttentionContext, cache: AttentionCache | None) -> Tensor:
        """See AttentionBackend.forward."""
        n_batch, n_tokens, _ = x_BTD.shape
        x_BSD, positions_BS = x_BTD, context.positions_BT.expand(n_batch, n_tokens)
        if cache is not None:
            assert isinstance(cache, RecomputeCache), type(cache)
            positions_BS = write_tokens(cache.positions_BS, positions_BS, context.n_past, token_axis=1)
            x_BSD = write_tokens(cache.x_BSD, x_BTD, context.n_past, token_axis=1)
            if isinstance(context.n_past, Tensor):
                # Shapes are static: what stands behind the new token is later, also for a class that asks positions.
                places_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
                positions_BS = torch.where(places_S > context.n_past[:, None], places_S, positions_BS)
        ids_BS = context.document_ids_BS
        if ids_BS is None:
            ids_BS = torch.zeros_like(positions_BS)
        out_BSD = self.custom(x_BSD, positions_BS, ids_BS)
        if isinstance(context.n_past, Tensor):
            rows_B = torch.arange(n_batch, device=x_BTD.device)
            return cast("Tensor", out_BSD[rows_B, context.n_past][:, None])
        return cast("Tensor", out_BSD[:, -n_tokens:])

    def new_cache(self, batch_size: int, max_tokens: int, *, history: TokenHistory | None = None) -> RecomputeCache:
        """See AttentionBackend.new_cache."""
        history = TokenHistory(batch_size, max_tokens) if history is None else history
        parameter = next(self.parameters())
        x_BSD = parameter.new_empty(batch_size, max_tokens, self.spec.d_model)
        return RecomputeCache(history, x_BSD, parameter.new_empty(batch_size, max_tokens, dtype=torch.int64))

    @property
    def kv_bytes_per_token(self) -> int:
        """D elements of the input, and its position in 8 bytes."""
        return self.spec.d_model * next(self.parameters()).itemsize + 8

    @property
    def constant_state_bytes(self) -> int:
        """None: nothing is kept but inputs."""
        return 0

    def flops(self, n_tokens: int) -> int:
        """Fitted to what was counted at MEASURED_LENGTHS: matrix products, convolutions and torch's own attention.

        Not the operations that a formula would count: if masked pairs are computed, they are in it.
        """
        linear, quadratic = fit_flops(self.spec)
        return round(linear * n_tokens + quadratic * n_tokens * n_tokens)

    @property
    def score_width(self) -> int:
        """None that a kernel of ours would have to take."""
        return 0


def build_module(attention: type, spec: CustomSpec) -> nn.Module:
    """attention(spec), a researcher's layer.

    Raises:
        ConfigError: its __init__ raises something (naming the line), or it is no module.
    """
    try:
        custom = attention(spec)
    except HydraError:
        raise
    except MISTAKES as error:
        raise ConfigError(
            f"a layer must be built from its spec, but {spec.name}(spec) "
            f"{describe_mistake(error, attention.__module__)}; correct it"
        ) from error
    if not isinstance(custom, nn.Module):
        raise ConfigError(f"an attention class must be a torch.nn.Module, but {spec.name} is none; derive it")
    return custom


def refuse_hidden_tensors(custom: nn.Module, name: str) -> None:
    """Return if parameters are all the values that the layer holds; ConfigError otherwise."""
    for path, module in custom.named_modules():
        held = {**module._buffers, **{key: value for key, value in vars(module).items() if isinstance(value, Tensor)}}
        for key in held:
            raise ConfigError(
                f"an attention class must hold no values but parameters, but {name} keeps the tensor "
                f"{f'{path}.{key}'.lstrip('.')!r}; compute it in forward from numbers"
            )


@functools.lru_cache(maxsize=256)
def fit_flops(spec: CustomSpec) -> tuple[float, float]:
    """Coefficients a, b of a n + b n^2 for the layer's forward pass; see fit_quadratic."""

    def build() -> nn.Module:
        return build_module(load_class(spec.name, spec.sha256), spec)

    return fit_quadratic({n_tokens: count_flops(build, spec.d_model, n_tokens) for n_tokens in MEASURED_LENGTHS})


def fit_quadratic(counts: Mapping[int, int]) -> tuple[float, float]:
    """a and b of a n + b n^2 for counts by n: least squares of count / n, to which a + b n is a line."""
    per_token = {n: count / n for n, count in counts.items()}
    mean_n, mean_count = sum(per_token) / len(per_token), sum(per_token.values()) / len(per_token)
    spread = sum((n - mean_n) ** 2 for n in per_token)
    slope = sum((n - mean_n) * (count - mean_count) for n, count in per_token.items()) / spread
    return mean_count - slope * mean_n, slope


@torch.no_grad()
def count_flops(build: Callable[[], Callable[..., Tensor]], d_model: int, n_tokens: int) -> int:
    """Floating-point operations of one row of n_tokens tokens, as FlopCounterMode counts them, 2 per multiply-add.

    Counted on tensors without memory, and past whoever watches this process's operators, such as a memory plan.
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes a while to import

    with _disable_current_modes(), torch.device("meta"):
        layer = build()
        x_BTD = torch.empty(1, n_tokens, d_model)
        positions_BT = torch.arange(n_tokens)[None]
        with FlopCounterMode(display=False) as counter:
            layer(x_BTD, positions_BT, torch.zeros_like(positions_BT))
    return int(counter.get_total_flops())
