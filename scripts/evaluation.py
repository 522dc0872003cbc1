"""What a model is worth on the validation text, and what it writes. Shapes: B rows, T tokens."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from hydra.data import Dataset
from hydra.errors import NotFiniteError
from hydra.model.framework import HydraModel, generate
from scripts.config import TrainingConfig

TEMPERATURE = 0.8
TOP_K = 50


def as_written(model: HydraModel) -> AbstractContextManager[object]:
    """Without the compiler's code: its form without gradients takes longer to compile than many evaluations save."""
    return torch.compiler.set_stance("force_eager") if model.is_compiled else nullcontext()


@torch.no_grad()
def evaluate(
    model: HydraModel,
    dataset: Dataset,
    device: torch.device,
    *,
    n_rows: int,
    n_tokens: int,
    is_stopped: Callable[[], bool],
) -> dict[str, float] | None:
    """Loss over the whole validation text, n_rows rows of n_tokens at a time, each token but the first counted once.

    Returns:
        `val_loss_nats`, the mean per token, and `val_bits_per_byte`, the sum over the UTF-8 bytes of the text; None
        when `is_stopped` said so in between.

    Raises:
        NotFiniteError: the loss is not finite.
    """
    sum_nats, n_targets = 0.0, 0
    for batch in dataset.validation_batches(n_rows=n_rows, n_tokens=n_tokens):
        if is_stopped():
            return None
        losses = model(*(torch.from_numpy(array).to(device) for array in batch)).losses
        sum_nats += float(losses["cross_entropy"])
        n_targets += batch.n_valid_tokens
    if not math.isfinite(sum_nats):
        raise NotFiniteError(f"the validation loss must be finite, but got {sum_nats=}; lower learning_rate")
    n_bytes = dataset.manifest["splits"]["validation"]["n_bytes"]
    return {"val_loss_nats": sum_nats / n_targets, "val_bits_per_byte": sum_nats / (math.log(2) * n_bytes)}


def write_sample(model: HydraModel, dataset: Dataset, config: TrainingConfig) -> str:
    """What the model writes after `sample_prompt` at the start of a document: the same draw at every point of a run."""
    prompt = dataset.tokenizer.encode(config.sample_prompt, add_special_tokens=False)
    prompt_ids = [int(dataset.manifest["tokenizer"]["bos_id"]), *prompt.ids]
    ids = generate(model, prompt_ids, config.sample_tokens, temperature=TEMPERATURE, top_k=TOP_K, seed=config.seed)
    return str(dataset.tokenizer.decode(ids))
