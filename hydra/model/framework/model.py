"""HydraModel: a decoder-only language model over any attention backend.

B batch, T tokens, D model width, V vocabulary.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydra.attention.base import AttentionCache
from hydra.attention.masks import AttentionContext, TokenHistory, build_context
from hydra.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy
from hydra.layers.norms import RMSNorm
from hydra.model.framework.blocks import Block
from hydra.model.framework.checkpointing import SELECTIVE_BUDGET, run_checkpointed
from hydra.model.framework.execution import Execution
from hydra.model.framework.spec import ModelSpec


class ModelOutput(NamedTuple):
    """With targets: losses and n_valid_tokens. Without: logits_BTV."""

    losses: dict[str, Tensor]
    """Loss terms by name, scalars: sums in nats over the valid targets, in float32 (float64 if the model is in it)."""
    n_valid_tokens: Tensor | None
    """How many targets are not IGNORE_INDEX, int64 scalar."""
    logits_BTV: Tensor | None
    """In the dtype of the model."""


@dataclasses.dataclass
class ModelCache:
    """Caches of all layers, and the count of tokens that they share."""

    history: TokenHistory
    layers: list[AttentionCache]


class HydraModel(nn.Module):
    """Embedding, pre-norm blocks, RMSNorm, head. Build it with build_model, which also initialises it."""

    def __init__(self, spec: ModelSpec, execution: Execution | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.execution = execution or Execution()
        self.is_compiled = False
        # Its own way of drawing first values imports torch's compiler on the meta device, which takes a second.
        self.embedding = nn.Embedding.from_pretrained(torch.empty(spec.vocab_size, spec.d_model), freeze=False)
        kernels = self.execution.kernels
        self.blocks = nn.ModuleList(Block(spec, layer, kernels) for layer in spec.plan_layers())
        self.final_norm = RMSNorm(spec.d_model, spec.norm_eps, kernels)
        # A tied head is no parameter of its own, so that nothing can untie it: not to_empty, not a checkpoint.
        if not spec.tie_embeddings:
            self.head = nn.Linear(spec.d_model, spec.vocab_size, bias=False)

    def lookup_names(self) -> frozenset[str]:
        """Parameters that only serve as tables: no matrix product reads them, so they cost no speed in float32."""
        return frozenset() if self.spec.tie_embeddings else frozenset({"embedding.weight"})

    def compile_regions(self) -> None:
        """Compile what is computed without a cache: each block, the last norm, and the element-wise part of the loss.

        Blocks of one kind share one compiled form for each of training and evaluation. Nothing happens yet: the first
        call of a shape compiles, and graph breaks are errors.
        """
        # Each shape of each model that a process builds is a form of the same code; torch expects fewer.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        # torch keeps compiled code with autograd functions in it only when told so; their bodies are part of the key.
        torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
        # Read when a block is compiled, and part of the key under which its compiled form is kept. It is the process's:
        # set in either case, since a model before this one may have left its own.
        is_selective = self.execution.activation_checkpointing == "selective"
        torch._functorch.config.activation_memory_budget = SELECTIVE_BUDGET if is_selective else 1.0
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False)
        self.final_norm.compile(fullgraph=True, dynamic=False)
        self.is_compiled = True

    @property
    def head_weight(self) -> Tensor:
        """The matrix (V, D) that makes logits."""
        return self.embedding.weight if self.spec.tie_embeddings else self.head.weight

    def forward(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: ModelCache | None = None,
    ) -> ModelOutput:
        """Predict the next token of every token.

        Args:
            inputs_BT: token ids, int64.
            targets_BT: token ids to predict, int64, IGNORE_INDEX where there is nothing to predict.
            document_ids_BT: integers; tokens of one document stand together and see that document only.
            cache: from new_cache; the tokens go on where it ends.
        Raises:
            ConfigError: the cache is too small, or its document ids are incomplete.
        """
        # The table may be in higher precision than the blocks.
        x_BTD = self.embedding(inputs_BT).to(self.final_norm.weight.dtype)
        context = build_context(
            x_BTD,
            document_ids_BT=document_ids_BT,
            history=None if cache is None else cache.history,
            kernel=self.execution.attention_kernel,
        )
        for layer_index, block in enumerate(self.typed_blocks()):
            own_context = block.attention.prepare(context)
            if cache is None:
                x_BTD = self._run_block(block, x_BTD, own_context)
            else:  # past the compiled form, which is for one shape
                x_BTD = block.forward(x_BTD, own_context, cache.layers[layer_index])
        x_BTD = self.final_norm(x_BTD) if cache is None else self.final_norm.forward(x_BTD)
        if targets_BT is None:
            return ModelOutput({}, None, F.linear(x_BTD, self.head_weight))
        cross_entropy = linear_cross_entropy(
            x_BTD.flatten(0, 1),
            self.head_weight,
            targets_BT.flatten(),
            is_compiled=self.is_compiled,
            kernels=self.execution.kernels,
        )
        return ModelOutput({"cross_entropy": cross_entropy}, (targets_BT != IGNORE_INDEX).sum(), None)

    def _run_block(self, block: Block, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        """One block without a cache, keeping for its backward pass what `execution` says."""
        kept = self.execution.activation_checkpointing
        # What a compiled block keeps in between was settled when it was compiled.
        if not torch.is_grad_enabled() or kept == "none" or (kept == "selective" and self.is_compiled):
            return block(x_BTD, context, None)
        return run_checkpointed(block, x_BTD, context, None, is_selective=kept == "selective")

    def new_cache(self, batch_size: int, max_tokens: int) -> ModelCache:
        """An empty cache for max_tokens tokens in each of batch_size rows, on the model's device and in its dtype."""
        history = TokenHistory(batch_size, max_tokens)
        layers = [block.attention.new_cache(batch_size, max_tokens, history=history) for block in self.typed_blocks()]
        return ModelCache(history, layers)

    def cache_bytes(self, n_tokens: int) -> int:
        """Bytes of the cache of one row of n_tokens tokens by the layers' formulas, in the dtype of the parameters."""
        layers = [block.attention for block in self.typed_blocks()]
        return sum(layer.kv_bytes_per_token * n_tokens + layer.constant_state_bytes for layer in layers)

    def typed_blocks(self) -> Iterable[Block]:
        """The blocks, of their own type: ModuleList has none."""
        return cast("Iterable[Block]", self.blocks)

    def n_parameters(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward_flops(self, n_tokens: int) -> int:
        """Forward floating-point operations of one sequence: matrices, convolutions, causal pairs, head; 2 per MAC."""
        head = 2 * self.spec.d_model * self.spec.vocab_size * n_tokens
        return head + sum(block.flops(n_tokens) for block in self.typed_blocks())

    def flops_per_token(self, n_tokens: int) -> float:
        """Training floating-point operations for each token of sequences of n_tokens: three times the forward ones.

        The backward pass is counted as twice the forward pass, recomputation not at all; causal score pairs.
        """
        return 3 * self.forward_flops(n_tokens) / n_tokens
