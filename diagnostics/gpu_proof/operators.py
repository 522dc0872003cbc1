"""The operators that are proved on a GPU: how to make inputs, what computes them, and who else does.

X rows, B batch, T tokens, N heads, H head width, D model width, F feed-forward width.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra.kernels.cca_convolution import cca_convolution
from hydra.kernels.lightning_attention import lightning_attention
from hydra.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy
from hydra.kernels.qk_norm_rope import qk_norm_rope
from hydra.kernels.reference import cca_convolution as cca_convolution_reference
from hydra.kernels.reference import lightning_attention as lightning_attention_reference
from hydra.kernels.reference import linear_cross_entropy as linear_cross_entropy_reference
from hydra.kernels.reference import qk_norm_rope as qk_norm_rope_reference
from hydra.kernels.reference import rms_norm as rms_norm_reference
from hydra.kernels.reference import squared_relu as squared_relu_reference
from hydra.kernels.reference import swiglu as swiglu_reference
from hydra.kernels.rms_norm import rms_norm
from hydra.kernels.squared_relu import squared_relu
from hydra.kernels.swiglu import swiglu
from hydra.layers.rotary import compute_rotary


@dataclass(frozen=True)
class Problem:
    """One operator on given inputs."""

    name: str
    inputs: Sequence[Tensor]
    names: Sequence[str]
    call: Callable[..., Tensor]
    """call(*inputs, kernels=...)."""
    reference: Callable[..., Tensor]
    """reference(*inputs), in float64."""
    others: dict[str, Callable[..., Tensor]]
    """The same by libraries that are installed, by name."""


Maker = Callable[[bool, torch.dtype], Problem]
"""From whether it shall be large (for speed) or small and ragged (for numerics), and the dtype, to a problem."""


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Standard normal numbers on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def make_rms_norm(is_large: bool, dtype: torch.dtype) -> Problem:
    """Rows of a residual stream."""
    n_rows, width = (16384, 2048) if is_large else (1003, 769)
    others = {}
    if importlib.util.find_spec("liger_kernel") is not None:
        function = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        others["Liger"] = lambda x, weight: function.apply(x, weight, 1e-6)
    return Problem(
        "rms_norm",
        [draw(n_rows, width, dtype=dtype), draw(width, dtype=dtype, seed=1)],
        ["x", "weight"],
        lambda x, weight, kernels: rms_norm(x, weight, 1e-6, kernels),
        lambda x, weight: rms_norm_reference.rms_norm(x, weight, 1e-6),
        others,
    )


def make_swiglu(is_large: bool, dtype: torch.dtype) -> Problem:
    """Gate and up of a feed-forward layer."""
    n_rows, width = (16384, 5632) if is_large else (103, 1333)
    others = {}
    if importlib.util.find_spec("liger_kernel") is not None:
        others["Liger"] = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply
    inputs = [draw(n_rows, width, dtype=dtype, seed=seed) for seed in (0, 1)]
    return Problem("swiglu", inputs, ["gate", "up"], swiglu, swiglu_reference.swiglu, others)


def make_squared_relu(is_large: bool, dtype: torch.dtype) -> Problem:
    """The inner activations of a feed-forward layer."""
    n_rows, width = (16384, 8192) if is_large else (103, 1333)
    x = draw(n_rows, width, dtype=dtype)
    return Problem("squared_relu", [x], ["x"], squared_relu, squared_relu_reference.squared_relu, {})


def make_qk_norm_rope(is_large: bool, dtype: torch.dtype) -> Problem:
    """Queries of gqa with qk_norm."""
    n_batch, n_tokens, n_heads, width, rotated = (8, 2048, 16, 128, 128) if is_large else (3, 77, 5, 36, 24)
    rotary = compute_rotary(torch.arange(n_tokens, device="cuda")[None], rotated, 10_000.0, torch.float32)
    return Problem(
        "qk_norm_rope",
        [draw(n_batch, n_tokens, n_heads, width, dtype=dtype)],
        ["x"],
        lambda x, kernels: qk_norm_rope(x, *rotary, norm_eps=1e-6, kernels=kernels),
        lambda x: qk_norm_rope_reference.qk_norm_rope(x, *rotary, 1e-6, None),
        {},
    )


def make_ccgqa_keys(is_large: bool, dtype: torch.dtype) -> Problem:
    """Keys of ccgqa: its epsilon, a temperature for each head, and half of the channels rotated."""
    n_batch, n_tokens, n_heads, width = (8, 2048, 16, 128) if is_large else (3, 77, 5, 36)
    rotary = compute_rotary(torch.arange(n_tokens, device="cuda")[None], width // 2, 10_000.0, torch.float32)
    return Problem(
        "qk_norm_rope, temperature",
        [draw(n_batch, n_tokens, n_heads, width, dtype=dtype), draw(n_heads, dtype=dtype, seed=1)],
        ["x", "temp"],
        lambda x, temp, kernels: qk_norm_rope(x, *rotary, norm_eps=1e-24, temp_N=temp, kernels=kernels),
        lambda x, temp: qk_norm_rope_reference.qk_norm_rope(x, *rotary, 1e-24, temp),
        {},
    )


def make_cca_convolution(is_large: bool, dtype: torch.dtype) -> Problem:
    """Queries and keys of ccgqa, of packed rows, before their norm."""
    n_batch, n_tokens, n_heads, n_kv_heads, width = (8, 2048, 8, 2, 128) if is_large else (3, 77, 4, 2, 36)
    n_channels = (n_heads + n_kv_heads) * width
    ids_BP = (torch.arange(2 + n_tokens, device="cuda") // 61).expand(n_batch, -1)
    options = {"n_kv_heads": n_kv_heads, "document_ids_BP": ids_BP}

    def join(heads: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(heads, dim=2)

    return Problem(
        "cca_convolution",
        [
            draw(n_batch, n_tokens, n_channels, dtype=dtype),
            draw(n_channels, 1, 2, dtype=dtype, seed=1),
            draw(n_channels, dtype=dtype, seed=2),
            draw(n_channels, width, 2, dtype=dtype, seed=3) * width**-0.5,
            draw(n_channels, dtype=dtype, seed=4),
        ],
        ["u", "weight 0", "bias 0", "weight 1", "bias 1"],
        lambda u, *weights, kernels: join(cca_convolution(u, None, *weights, **options, kernels=kernels)),
        lambda u, *weights: join(cca_convolution_reference.cca_convolution(u, None, *weights, **options)),
        {},
    )


def make_lightning_attention(is_large: bool, dtype: torch.dtype) -> Problem:
    """Lightning attention of packed rows, with MiniMax-01's decay; its outputs."""
    n_batch, n_tokens, n_heads, width = (8, 2048, 16, 128) if is_large else (2, 150, 3, 40)
    slopes_N = torch.exp2(torch.arange(1, n_heads + 1, device="cuda") * (-8 / n_heads))
    ids_BP = (torch.arange(1 + n_tokens, device="cuda") // (n_tokens // 2)).expand(n_batch, -1)
    return Problem(
        "lightning_attention",
        [draw(n_batch, n_tokens, n_heads, width, dtype=dtype, seed=seed) * width**-0.25 for seed in range(3)],
        ["q", "k", "v"],
        lambda q, k, v, kernels: lightning_attention(q, k, v, slopes_N, ids_BP, kernels=kernels)[0],
        lambda q, k, v: lightning_attention_reference.lightning_attention(q, k, v, slopes_N, ids_BP)[0],
        {},
    )


def make_linear_cross_entropy(is_large: bool, dtype: torch.dtype) -> Problem:
    """The loss of a batch; every seventh target is left out."""
    n_rows, width, vocab_size = (16384, 1024, 50304) if is_large else (300, 64, 5003)
    targets_X = torch.randint(vocab_size, (n_rows,), generator=torch.Generator().manual_seed(0)).cuda()
    targets_X[::7] = IGNORE_INDEX
    others = {}
    if importlib.util.find_spec("liger_kernel") is not None:
        loss = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(reduction="sum")
        others["Liger"] = lambda x, weight: loss(weight, x, targets_X)[None]
    return Problem(
        "linear_cross_entropy",
        [draw(n_rows, width, dtype=dtype), draw(vocab_size, width, dtype=dtype, seed=1) * width**-0.5],
        ["x", "weight"],
        # In the dtype of x: a loss is in float32 whatever the others are in.
        lambda x, weight, kernels: linear_cross_entropy(x, weight, targets_X, kernels=kernels).to(x.dtype)[None],
        lambda x, weight: linear_cross_entropy_reference.linear_cross_entropy(x, weight, targets_X)[None],
        others,
    )


MAKERS: tuple[Maker, ...] = (
    make_rms_norm,
    make_qk_norm_rope,
    make_ccgqa_keys,
    make_swiglu,
    make_squared_relu,
    make_cca_convolution,
    make_lightning_attention,
    make_linear_cross_entropy,
)
