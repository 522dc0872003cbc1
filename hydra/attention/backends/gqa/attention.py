"""Grouped-query attention (Ainslie et al., arXiv 2305.13245), which covers multi-head and multi-query attention.

B batch, T new tokens, S tokens so far, D model width, N query heads, K key/value heads, H head width.
"""

from torch import Tensor, nn

from hydra.attention.backends.gqa.spec import GQASpec
from hydra.attention.base import AttentionBackend, AttentionCache, KeyValueCache, count_visible_pairs
from hydra.attention.core import softmax_attention
from hydra.attention.masks import AttentionContext, TokenHistory
from hydra.kernels.qk_norm_rope import qk_norm_rope

NORM_EPS = 1e-6


class GroupedQueryAttention(AttentionBackend):
    """softmax(q k^T / sqrt(H)) v with rotary q, k; query head n reads key/value head n // (N / K). No biases.

    With qk_norm, q and k are divided by their root mean square over each head first, so that scores stay below sqrt(H).
    With a window, a token sees that many tokens, its own included (Beltagy et al., arXiv 2004.05150, section 3.1).
    """

    spec: GQASpec

    def __init__(self, spec: GQASpec) -> None:
        super().__init__(spec)
        kv_width = spec.n_kv_heads * spec.head_width
        self.q_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)
        self.k_proj = nn.Linear(spec.d_model, kv_width, bias=False)
        self.v_proj = nn.Linear(spec.d_model, kv_width, bias=False)
        self.o_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)

    def prepare(self, context: AttentionContext) -> AttentionContext:
        """See AttentionBackend.prepare."""
        spec = self.spec
        rotary = (spec.head_width, spec.rope_base)
        return context.specialise(self.q_proj.weight.dtype, rotary=rotary, window=spec.window or None)

    def attend(self, x_BTD: Tensor, context: AttentionContext, cache: AttentionCache | None) -> Tensor:
        """See AttentionBackend.forward."""
        spec = self.spec
        n_batch, n_tokens, _ = x_BTD.shape
        q_BTNH = self.q_proj(x_BTD).view(n_batch, n_tokens, spec.n_heads, spec.head_width)
        k_BTKH = self.k_proj(x_BTD).view(n_batch, n_tokens, spec.n_kv_heads, spec.head_width)
        v_BTKH = self.v_proj(x_BTD).view(n_batch, n_tokens, spec.n_kv_heads, spec.head_width)
        assert context.rotary is not None
        norm_eps = NORM_EPS if spec.qk_norm else None
        q_BNTH = qk_norm_rope(q_BTNH, *context.rotary, norm_eps=norm_eps, kernels=self.kernels).transpose(1, 2)
        k_BKSH = qk_norm_rope(k_BTKH, *context.rotary, norm_eps=norm_eps, kernels=self.kernels).transpose(1, 2)
        v_BKSH = v_BTKH.transpose(1, 2)
        if cache is not None:
            assert isinstance(cache, KeyValueCache), type(cache)
            k_BKSH, v_BKSH = cache.append(k_BKSH, v_BKSH, context.n_past)
        out_BNTH = softmax_attention(q_BNTH, k_BKSH, v_BKSH, context)
        return self.o_proj(out_BNTH.transpose(1, 2).reshape(n_batch, n_tokens, spec.d_model))

    def new_cache(self, batch_size: int, max_tokens: int, *, history: TokenHistory | None = None) -> KeyValueCache:
        """See AttentionBackend.new_cache. Keys are stored after the rotary embedding."""
        history = TokenHistory(batch_size, max_tokens) if history is None else history
        return KeyValueCache(history, *self.empty_kv(batch_size, self.spec.n_kv_heads, max_tokens))

    @property
    def kv_bytes_per_token(self) -> int:
        """2 K H elements."""
        return 2 * self.spec.n_kv_heads * self.spec.head_width * self.q_proj.weight.itemsize

    @property
    def constant_state_bytes(self) -> int:
        """None: keys and values are all there is."""
        return 0

    def flops(self, n_tokens: int) -> int:
        """2 * parameters * T + 4 D * visible pairs."""
        spec = self.spec
        n_weights = 2 * spec.d_model * spec.d_model + 2 * spec.d_model * spec.n_kv_heads * spec.head_width
        return 2 * n_weights * n_tokens + 4 * spec.d_model * count_visible_pairs(n_tokens, spec.window)
