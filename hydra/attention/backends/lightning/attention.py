"""Lightning attention (MiniMax-01, arXiv 2501.08313, section 2.2; module and decay as in the released code).

Linear attention: queries and keys pass SiLU instead of softmax, and what a token adds to the state fades by a fixed
factor with every token after it. There is no rotary embedding: the decay alone tells near from far.

B batch, T new tokens, P = 1 + T, D model width, N heads, H head width.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydra.attention.backends.lightning.spec import LightningSpec
from hydra.attention.base import AttentionBackend, AttentionCache
from hydra.attention.masks import AttentionContext, TokenHistory
from hydra.kernels.lightning_attention import count_lightning_flops, lightning_attention, lightning_attention_step
from hydra.layers.norms import RMSNorm

NORM_EPS = 1e-6


@dataclasses.dataclass
class LightningCache(AttentionCache):
    """The state: all that a layer keeps, whatever the number of tokens."""

    state_BNHH: Tensor
    """Sum of decayed k^T v, key channels first, in at least float32; zeros before the first token."""

    def state_tensors(self) -> list[Tensor]:
        """Tensors whose size does not depend on the number of tokens."""
        return [self.state_BNHH]


@dataclasses.dataclass(frozen=True)
class LightningContext(AttentionContext):
    """What a lightning layer knows of the tokens and of itself, as data: layers that differ in it are compiled once."""

    slopes_N: Tensor | None = None
    """See compute_slopes; always there."""
    document_ids_BP: Tensor | None = None
    """Document of the token before the new ones, then theirs; None when a row is one document."""


class LightningAttention(AttentionBackend):
    """o_proj(norm(heads) sigmoid(gate)), each head q_t (sum over s <= t of exp(-slope (t - s)) k_s^T v_s). No biases.

    Queries, keys and values pass SiLU. The norm is over all heads together and comes before the gate.
    """

    spec: LightningSpec

    def __init__(self, spec: LightningSpec) -> None:
        super().__init__(spec)
        width = spec.d_model
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        if spec.gate_rank == 0:
            self.gate_proj = nn.Linear(width, width, bias=False)
        else:
            self.gate_down_proj = nn.Linear(width, spec.gate_rank, bias=False)
            self.gate_up_proj = nn.Linear(spec.gate_rank, width, bias=False)
        self.norm = RMSNorm(width, eps=NORM_EPS)
        self.o_proj = nn.Linear(width, width, bias=False)

    def prepare(self, context: AttentionContext) -> AttentionContext:
        """See AttentionBackend.prepare."""
        dtype = torch.promote_types(self.q_proj.weight.dtype, torch.float32)
        return LightningContext(
            context.n_past,
            context.positions_BT,
            document_ids_BS=context.document_ids_BS,
            slopes_N=compute_slopes(self.spec, context.positions_BT.device, dtype),
            document_ids_BP=context.recent_document_ids(1),
        )

    def attend(self, x_BTD: Tensor, context: AttentionContext, cache: AttentionCache | None) -> Tensor:
        """See AttentionBackend.forward."""
        assert isinstance(context, LightningContext), type(context)
        assert cache is None or isinstance(cache, LightningCache), type(cache)
        heads = (self.spec.n_heads, self.spec.head_width)
        q_BTNH, k_BTNH, v_BTNH = (
            F.silu(project(x_BTD)).unflatten(2, heads) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BTNH = self.mix_tokens(q_BTNH, k_BTNH, v_BTNH, context, cache)
        gate_BTD = self.gate_proj(x_BTD) if self.spec.gate_rank == 0 else self.gate_up_proj(self.gate_down_proj(x_BTD))
        return self.o_proj(self.norm(out_BTNH.flatten(2)) * torch.sigmoid(gate_BTD))

    def mix_tokens(
        self, q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, context: LightningContext, cache: LightningCache | None
    ) -> Tensor:
        """The heads (B, T, N, H); the state of the cache moves on behind the last token."""
        slopes_N, ids_BP = context.slopes_N, context.document_ids_BP
        assert slopes_N is not None
        if cache is None:
            return lightning_attention(q_BTNH, k_BTNH, v_BTNH, slopes_N, ids_BP, kernels=self.kernels)[0]
        if q_BTNH.shape[1] > 1:
            out_BTNH, state_BNHH = lightning_attention(
                q_BTNH, k_BTNH, v_BTNH, slopes_N, ids_BP, cache.state_BNHH, kernels=self.kernels
            )
        else:
            state_BNHH = cache.state_BNHH
            if ids_BP is not None:
                state_BNHH = state_BNHH.masked_fill((ids_BP[:, 0] != ids_BP[:, 1])[:, None, None, None], 0)
            q_BNH, k_BNH, v_BNH = q_BTNH[:, 0], k_BTNH[:, 0], v_BTNH[:, 0]
            out_BNH, state_BNHH = lightning_attention_step(q_BNH, k_BNH, v_BNH, slopes_N, state_BNHH)
            out_BTNH = out_BNH[:, None]
        cache.state_BNHH.copy_(state_BNHH)
        return out_BTNH

    def new_cache(self, batch_size: int, max_tokens: int, *, history: TokenHistory | None = None) -> LightningCache:
        """See AttentionBackend.new_cache. The state is in float32, or for a layer in float64 in that."""
        spec, weight = self.spec, self.q_proj.weight
        history = TokenHistory(batch_size, max_tokens) if history is None else history
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = (batch_size, spec.n_heads, spec.head_width, spec.head_width)
        return LightningCache(history, weight.new_zeros(shape, dtype=dtype))

    @property
    def kv_bytes_per_token(self) -> int:
        """None: the state does not grow."""
        return 0

    @property
    def constant_state_bytes(self) -> int:
        """N H^2 elements of float32, or of the parameters' dtype if that is wider."""
        n_elements = self.spec.n_heads * self.spec.head_width**2
        return n_elements * torch.promote_types(self.q_proj.weight.dtype, torch.float32).itemsize

    @property
    def score_width(self) -> int:
        """0: nothing is scored by a kernel of softmax attention."""
        return 0

    def flops(self, n_tokens: int) -> int:
        """2 * matrices * T + 4 D H T for the state + 4 D n^2 for each chunk of n tokens; see count_lightning_flops.

        Unlike softmax attention's, the pairs of a chunk are counted as they are computed, without regard to causality.
        """
        spec = self.spec
        gate_width = spec.d_model if spec.gate_rank == 0 else 2 * spec.gate_rank
        n_weights = (4 * spec.d_model + gate_width) * spec.d_model
        return 2 * n_weights * n_tokens + count_lightning_flops(n_tokens, spec.n_heads, spec.head_width)


def compute_slopes(spec: LightningSpec, device: torch.device, dtype: torch.dtype) -> Tensor:
    """How fast each head forgets in this layer, in nats per token, (N,): 2^(-8 h / N) for h = 1..N, times layer_factor.

    Computed where it is needed: a buffer could be cast to bfloat16, or left without values by the meta device.
    """
    heads_N = torch.arange(1, spec.n_heads + 1, device=device, dtype=dtype)
    return torch.exp2(heads_N * (-8 / spec.n_heads)) * spec.layer_factor
