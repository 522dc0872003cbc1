"""Decoder: many tokens from one model, fast. All shapes are fixed, so that one compiled step serves every token.

generate() is the simple way and the reference; a Decoder costs a compilation first (see Decoder).

B streams, T tokens, D model width, V vocabulary, O outputs, I inputs, S tokens that a cache holds.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydra.attention.base import AttentionCache
from hydra.attention.core import DECODE_KERNEL
from hydra.attention.masks import AttentionContext, TokenHistory, build_context
from hydra.attention.spec import check_int, check_known
from hydra.errors import ConfigError
from hydra.kernels.decode import NATIVE_DTYPES, direct_calls, load_native, native_linear, pack
from hydra.model.framework.generation import check_sampling, choose_token, draw_uniforms
from hydra.model.framework.model import HydraModel
from hydra.model.framework.quantisation import ZERO_POINT, Int8Matrix, Int8Weights, find_matrices

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("compiled", "reference")
# On a CPU: no Python between kernels, and no threads for the small ones, whose start would take longer than they do.
CPU_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "cpp_wrapper": True,
    "cpp.threads": 1,
    "size_asserts": False,
}


class PackedLinear(nn.Module):
    """x W^T without bias, W in memory of the decoder's own, as it is or in 8 bits."""

    def __init__(self, weight_OI: Tensor, scales_O: Tensor | None, dtype: torch.dtype, is_native: bool) -> None:
        super().__init__()
        self.weight_OI = weight_OI
        self.scales_O = scales_O
        self.dtype = dtype
        self.is_native = is_native

    @property
    def weight(self) -> Tensor:
        """The matrix in the dtype of the activations."""
        if self.scales_O is None:
            return self.weight_OI
        return Int8Matrix(self.weight_OI, self.scales_O).dequantise(self.dtype)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Map (B, T, I) to (B, T, O)."""
        if self.is_native and x_BTI.shape[1] == 1:
            return native_linear(x_BTI.contiguous(), self.weight_OI, self.scales_O)
        if self.scales_O is None:
            return F.linear(x_BTI, self.weight_OI)
        # 255 levels from -1 to 1 are exact in any dtype, and their scales are cheaper to apply to a prompt's outputs.
        levels_OI = (self.weight_OI.to(self.dtype) - ZERO_POINT) / ZERO_POINT
        return (F.linear(x_BTI, levels_OI) * (self.scales_O * ZERO_POINT)).to(self.dtype)


class Decoder:
    """Continues prompts in up to n_streams streams at once, each as it would be continued alone.

    Args:
        model: stays as it is, and must: the decoder shares what it has no faster form of, and keeps copies of the rest.
        max_tokens: prompt and new tokens of the longest stream.
        n_streams: prompts of one call of generate.
        dtype: of weights and activations; default the model's.
        int8: weights that quantise_int8 found good enough, in place of the model's matrices.
        implementation: `compiled` makes one graph of a step, on a CPU with C++ kernels of our own. `reference` is the
            same step in plain torch, for machines without a C++ compiler; slow.
    Raises:
        ConfigError: an argument out of range, or there is no C++ compiler.
    """

    def __init__(
        self,
        model: HydraModel,
        *,
        max_tokens: int,
        n_streams: int = 1,
        dtype: torch.dtype | None = None,
        int8: Int8Weights | None = None,
        implementation: str = "compiled",
    ) -> None:
        check_int("max_tokens", max_tokens)
        check_int("n_streams", n_streams)
        check_known("implementation", [implementation], IMPLEMENTATIONS)
        self.device = model.embedding.weight.device
        self.dtype = model.final_norm.weight.dtype if dtype is None else dtype
        self.max_tokens, self.n_streams, self.vocab_size = max_tokens, n_streams, model.spec.vocab_size
        is_native = implementation == "compiled" and self.device.type == "cpu"
        if is_native:
            if self.dtype not in NATIVE_DTYPES:
                raise ConfigError(
                    f"dtype must be one of {', '.join(map(str, NATIVE_DTYPES))} for compiled decoding on a CPU, but "
                    f"got {self.dtype}; pass dtype=torch.float32, or implementation='reference'"
                )
            load_native(torch.get_num_threads())
        self.kernel = DECODE_KERNEL if is_native else "scaled_dot_product"
        self.prefill_kernel = model.execution.attention_kernel
        self._build_modules(model, int8, is_native)

        self.rotary_tables = self._build_rotary_tables()
        self.mask_B11S = torch.empty(n_streams, 1, 1, max_tokens, dtype=self.dtype, device=self.device)
        self.rows_B = torch.arange(n_streams, device=self.device)
        self.n_past_B = torch.zeros(n_streams, dtype=torch.int64, device=self.device)
        self.next_ids_B = torch.zeros(n_streams, dtype=torch.int64, device=self.device)
        self.decode_step: Callable[[], Tensor] = self._step
        if implementation == "compiled":
            self.decode_step = self._compile()
        logger.info("decoding: %s, %s, %s matrices", implementation, self.dtype, "own" if int8 is None else "8-bit")

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        n_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> list[list[int]]:
        """Continue n_streams prompts, of any lengths; stream b as generate() does with seed + b, up to rounding.

        Raises:
            ConfigError: an argument out of range.
        """
        check_sampling(self.vocab_size, prompts, n_new_tokens, temperature, top_k)
        if len(prompts) != self.n_streams:
            raise ConfigError(
                f"there must be one prompt for each of {self.n_streams} streams, but got {len(prompts)}; "
                "make a Decoder with another n_streams"
            )
        n_longest = max(map(len, prompts)) + n_new_tokens
        if n_longest > self.max_tokens:
            raise ConfigError(
                f"prompt and new tokens must be at most max_tokens={self.max_tokens}, but got {n_longest}; make a "
                "Decoder with a larger max_tokens"
            )
        if n_new_tokens == 0:
            return [[] for _ in prompts]
        uniforms_TB = draw_uniforms(n_new_tokens, [seed + row for row in range(self.n_streams)], self.device)
        new_ids_TB = torch.empty(n_new_tokens, self.n_streams, dtype=torch.int64, device=self.device)
        logits_BV = self._prefill(prompts)
        for index in range(n_new_tokens):
            if index > 0:
                logits_BV = self.decode_step()
            if temperature > 0.0:
                self.next_ids_B.copy_(choose_token(logits_BV, temperature, top_k, uniforms_TB[index]))
            new_ids_TB[index] = self.next_ids_B
        return new_ids_TB.T.tolist()

    def _build_modules(self, model: HydraModel, int8: Int8Weights | None, is_native: bool) -> None:
        """A model of the same spec whose linear layers are packed, and the caches of its layers."""
        with torch.device("meta"):
            copy = HydraModel(dataclasses.replace(model.spec, tie_embeddings=False), model.execution)
        matrices = find_matrices(model)
        state = {name: value.detach().to(self.dtype) for name, value in model.state_dict().items()}
        state["head.weight"] = matrices["head"].detach().to(self.dtype)
        copy.load_state_dict(state, assign=True)
        copy.requires_grad_(False)
        self.caches = copy.new_cache(self.n_streams, self.max_tokens).layers
        if int8 is not None:
            check_belongs(int8, matrices)
            tensors = [part for name in matrices for part in dataclasses.astuple(int8.matrices[name])]
        else:
            tensors = [state[f"{name}.weight"] for name in matrices]
        packed = iter(pack(tensors) if is_native else tensors)
        for name in matrices:
            weight_OI = next(packed)
            scales_O = None if int8 is None else next(packed).to(self.device)
            parent, _, attribute = name.rpartition(".")
            layer = PackedLinear(weight_OI.to(self.device), scales_O, self.dtype, is_native)
            setattr(copy.get_submodule(parent), attribute, layer)
        self.model = copy

    def _compute_logits(self, ids_BT: Tensor, context: AttentionContext, caches: list[AttentionCache]) -> Tensor:
        """Of the last token of each row, (B, V); the tokens are added to the caches."""
        x_BTD = self.model.embedding(ids_BT)
        for block, cache in zip(self.model.typed_blocks(), caches, strict=True):
            x_BTD = block.forward(x_BTD, block.attention.prepare(context), cache)
        return self.model.head(self.model.final_norm(x_BTD[:, -1:]))[:, 0]

    def _build_rotary_tables(self) -> dict[tuple[int, float], tuple[Tensor, Tensor]]:
        """Cosines and sines (S, R) of all positions, by what the layers ask for."""
        context = AttentionContext(0, torch.arange(self.max_tokens, device=self.device)[None], kernel=DECODE_KERNEL)
        for block in self.model.typed_blocks():
            block.attention.prepare(context)
        return {key: (cos[0, :, 0], sin[0, :, 0]) for key, (cos, sin) in context.rotary_tables.items()}

    def _step(self) -> Tensor:
        """Feed next_ids_B at the places n_past_B, count them, and return the logits of what follows.

        The likeliest tokens are left in next_ids_B: a greedy continuation need not do anything between two steps.
        """
        self.mask_B11S[self.rows_B, 0, 0, self.n_past_B] = 0.0
        context = AttentionContext(self.n_past_B, self.n_past_B[:, None], kernel=self.kernel, mask_B1TS=self.mask_B11S)
        for key, (cos_SR, sin_SR) in self.rotary_tables.items():
            tables = cos_SR[self.n_past_B][:, None, None], sin_SR[self.n_past_B][:, None, None]
            context.rotary_tables[key] = tables
        logits_BV = self._compute_logits(self.next_ids_B[:, None], context, self.caches)
        self.n_past_B.add_(1)
        self.next_ids_B.copy_(logits_BV.argmax(dim=-1))
        return logits_BV

    def _prefill(self, prompts: list[list[int]]) -> Tensor:
        """As `_step` for whole prompts, each by itself: a stream does not depend on its neighbours' lengths."""
        self._clear()
        rows = []
        for row, prompt_ids in enumerate(prompts):
            ids_BT = torch.tensor([prompt_ids], device=self.device)
            x_BTD = self.model.embedding(ids_BT)
            history = TokenHistory(1, self.max_tokens)
            context = build_context(x_BTD, history=history, kernel=self.prefill_kernel)
            rows.append(self._compute_logits(ids_BT, context, [cache.row(row) for cache in self.caches]))
            self.n_past_B[row] = len(prompt_ids)
            self.mask_B11S[row, ..., : len(prompt_ids)] = 0.0
        logits_BV = torch.cat(rows)
        self.next_ids_B.copy_(logits_BV.argmax(dim=-1))
        return logits_BV

    def _clear(self) -> None:
        for cache in self.caches:
            cache.clear()
        self.mask_B11S.fill_(-torch.inf)
        self.n_past_B.zero_()
        self.next_ids_B.zero_()

    def _compile(self) -> Callable[[], Tensor]:
        """One graph of a step; on a GPU also recorded, and replayed without the host."""
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        if self.device.type == "cpu":
            from hydra.kernels.joint_products import JoinProducts  # imports torch's compiler

            options |= {
                **CPU_OPTIONS,
                "aot_inductor.custom_ops_to_c_shims": direct_calls(),
                "post_grad_custom_pre_pass": JoinProducts(),
            }
        # Nothing that the step reads is ever replaced: no guards. Isolated: no other decoder takes it for its own.
        step = torch.compile(self._step, fullgraph=True, dynamic=False, options=options, isolate_recompiles=True)  # type: ignore[call-overload]
        with torch.no_grad(), any_order():
            self._clear()
            step()
            if self.device.type != "cuda":
                return step
            step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits_BV = step()

        def replay() -> Tensor:
            graph.replay()
            return logits_BV

        return replay


@contextlib.contextmanager
def any_order() -> Iterator[None]:
    """Without torch's deterministic mode, in which a trainer may have left this process.

    A step writes no place twice, so it is deterministic anyway; and in that mode code compiled for a CPU writes to a
    cache by a call that ends the process for some shapes (torch 2.13).
    """
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    # torch.use_deterministic_algorithms would tell torch's compiler, whose code reads this value itself.
    torch._C._set_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(was_deterministic)


def check_belongs(int8: Int8Weights, matrices: dict[str, Tensor]) -> None:
    """Return if these 8-bit weights can stand for these matrices; ConfigError otherwise."""
    shapes = {name: matrix.weight_OI.shape for name, matrix in int8.matrices.items()}
    expected = {name: weight_OI.shape for name, weight_OI in matrices.items()}
    if shapes != expected:
        raise ConfigError(
            "int8 must be made from the model that it is used with, but matrices or shapes differ; call "
            "quantise_int8 on this model"
        )
