"""transformers' Llama of the shape that all contestants have, for its training and its decoding."""

from typing import Any

from transformers import LlamaConfig


def build_config(spec: dict[str, Any], **fields: object) -> LlamaConfig:
    """As many key/value heads as heads, a gated network with the weights of the others'; `fields` are transformers'."""
    return LlamaConfig(
        vocab_size=spec["vocab_size"],
        hidden_size=spec["d_model"],
        intermediate_size=spec["d_gated_feed_forward"],
        num_hidden_layers=spec["n_layers"],
        num_attention_heads=spec["n_heads"],
        num_key_value_heads=spec["n_heads"],
        max_position_embeddings=spec["n_tokens"],
        **fields,
    )
