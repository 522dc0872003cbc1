"""transformers' generate at a gate, in the peers' environment: one step is one continuation of the same prompt."""

import copy
import json
import sys
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM

from diagnostics.bench.contestants.llama import build_config
from diagnostics.bench.gate import Gate, decode_at_gate


def main(spec: dict[str, Any]) -> None:
    """Decode for as long as the harness asks."""
    gate = Gate(spec)
    torch.manual_seed(0)
    config = build_config(spec, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None)
    exact = LlamaForCausalLM(config).eval()
    model = copy.deepcopy(exact).to(getattr(torch, spec["dtype"]))
    greedy = GenerationConfig(max_new_tokens=spec["n_new"], do_sample=False, use_cache=True, pad_token_id=0)

    def continue_prompt(prompt: list[int], n_new: int) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        return out[0, len(prompt) :].tolist()

    decode_at_gate(gate, spec, continue_prompt, lambda ids_BT: exact(ids_BT).logits)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
