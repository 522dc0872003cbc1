import math

import pytest
import torch
import torch.nn.functional as F

from hydra.attention import available_backends
from hydra.errors import ConfigError
from hydra.model.framework import build_model
from hydra.testing.specs import build_random_model, document_ids, tiny_model_spec
from hydra.testing.tolerances import assert_close

pytestmark = pytest.mark.parametrize("attention", available_backends())


def tokens(n_batch: int, n_tokens: int) -> torch.Tensor:
    return torch.randint(61, (n_batch, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


def test_losses_are_sums_over_valid_targets(attention: str) -> None:
    model, inputs_BT = build_random_model(torch.float32, attention=attention), tokens(2, 9)
    targets_BT = tokens(2, 10)[:, 1:].clone()
    targets_BT[0, 4:] = -100
    output = model(inputs_BT, targets_BT)
    logits_BTV = model(inputs_BT).logits_BTV
    expected = -sum(
        logits_BTV[b, t].log_softmax(-1)[targets_BT[b, t]] for b in range(2) for t in range(9) if targets_BT[b, t] >= 0
    )
    assert set(output.losses) == {"cross_entropy"}
    assert output.losses["cross_entropy"].shape == ()
    assert_close(output.losses["cross_entropy"], expected, torch.float32, "loss")
    assert output.n_valid_tokens.item() == 13
    assert output.logits_BTV is None
    nothing = model(inputs_BT, torch.full_like(targets_BT, -100))
    assert (nothing.losses["cross_entropy"].item(), nothing.n_valid_tokens.item()) == (0.0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(attention: str, dtype: torch.dtype) -> None:
    model = build_model(tiny_model_spec(attention=attention), dtype=dtype)
    output = model(tokens(2, 9), tokens(2, 9), document_ids(4, 5).expand(2, -1))
    output.losses["cross_entropy"].backward()
    assert output.losses["cross_entropy"].dtype == torch.promote_types(dtype, torch.float32)
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    assert model(tokens(2, 9)).logits_BTV.dtype == dtype


def test_a_fresh_model_predicts_uniformly(attention: str) -> None:
    model = build_model(tiny_model_spec(attention=attention, tie_embeddings=False))
    output = model(tokens(4, 33), tokens(4, 33).roll(1, 1))
    assert output.losses["cross_entropy"].item() / 132 == pytest.approx(math.log(61), abs=0.05)


def test_documents_do_not_see_each_other(attention: str) -> None:
    model, inputs_BT, ids_BT = build_random_model(attention=attention), tokens(1, 13), document_ids(5, 1, 7)
    logits_BTV = model(inputs_BT, document_ids_BT=ids_BT).logits_BTV
    alone = torch.cat([model(part).logits_BTV for part in inputs_BT.split([5, 1, 7], dim=1)], dim=1)
    assert_close(logits_BTV, alone, torch.float64, "documents")
    changed_BT = inputs_BT.clone()
    changed_BT[:, :5] = (changed_BT[:, :5] + 1) % 61
    changed_BTV = model(changed_BT, document_ids_BT=ids_BT).logits_BTV
    assert torch.equal(changed_BTV[:, 5:], logits_BTV[:, 5:])
    assert (changed_BTV[:, :5] - logits_BTV[:, :5]).abs().amax(-1).min() > 1e-3


def test_later_tokens_change_nothing(attention: str) -> None:
    model, inputs_BT = build_random_model(torch.float32, attention=attention), tokens(2, 9)
    changed_BT = inputs_BT.clone()
    changed_BT[:, 6] = (changed_BT[:, 6] + 1) % 61
    logits_BTV, changed_BTV = model(inputs_BT).logits_BTV, model(changed_BT).logits_BTV
    assert torch.equal(logits_BTV[:, :6], changed_BTV[:, :6])
    assert not torch.equal(logits_BTV[:, 6], changed_BTV[:, 6])


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@torch.no_grad()
def test_prefill_and_decode_equal_one_pass(attention: str, packed: bool) -> None:
    model, inputs_BT = build_random_model(attention=attention), tokens(2, 11)
    ids_BT = document_ids(4, 7).expand(2, -1) if packed else None
    expected = model(inputs_BT, document_ids_BT=ids_BT).logits_BTV
    for split in ([5, 1, 1, 1, 3], [1] * 11):
        cache, pieces, start = model.new_cache(2, 11), [], 0
        for length in split:
            stop = start + length
            ids = None if ids_BT is None else ids_BT[:, start:stop]
            pieces.append(model(inputs_BT[:, start:stop], document_ids_BT=ids, cache=cache).logits_BTV)
            start = stop
        assert_close(torch.cat(pieces, dim=1), expected, torch.float64, str(split))
        assert cache.history.n_tokens == 11
        assert all(layer.history is cache.history for layer in cache.layers)
        with pytest.raises(ConfigError, match="max_tokens=11"):
            model(inputs_BT[:, :1], cache=cache)


def test_the_cache_takes_what_the_layers_say(attention: str) -> None:
    model = build_model(tiny_model_spec(attention=attention, n_layers=3))
    cache, layer = model.new_cache(2, 7), model.blocks[0].attention
    tensors = [t for c in cache.layers for t in (*c.token_tensors(), *c.state_tensors())]
    assert sum(t.nbytes for t in tensors) == 2 * 3 * (7 * layer.kv_bytes_per_token + layer.constant_state_bytes)


def test_a_tied_head_is_the_embedding(attention: str) -> None:
    tied, untied = (build_model(tiny_model_spec(attention=attention, tie_embeddings=tie)) for tie in (True, False))
    assert tied.head_weight.data_ptr() == tied.embedding.weight.data_ptr()
    assert untied.n_parameters() - tied.n_parameters() == 61 * 32
    assert untied.head_weight.data_ptr() != untied.embedding.weight.data_ptr()
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"head.weight"}
    # Moving and loading must not untie it.
    moved = tied.to(torch.float64)
    moved.load_state_dict({name: value + 1 for name, value in moved.state_dict().items()})
    assert moved.head_weight.data_ptr() == moved.embedding.weight.data_ptr()


@pytest.mark.parametrize("feed_forward", ["swiglu", "squared_relu"])
def test_parameters_are_the_sum_of_the_parts(attention: str, feed_forward: str) -> None:
    model = build_model(tiny_model_spec(attention=attention, feed_forward=feed_forward))
    in_attention = sum(p.numel() for p in model.blocks[0].attention.parameters())
    n_matrices = {"swiglu": 3, "squared_relu": 2}[feed_forward]
    assert model.n_parameters() == 61 * 32 + 2 * (in_attention + n_matrices * 32 * 48 + 2 * 32) + 32


def test_training_operations(attention: str) -> None:
    """Three times the forward operations: attention with causal pairs, feed-forward, head; divided by the tokens."""
    model = build_model(tiny_model_spec(attention=attention))
    forward = 2 * (model.blocks[0].attention.flops(9) + 2 * 3 * 32 * 48 * 9) + 2 * 61 * 32 * 9
    assert model.forward_flops(9) == forward
    assert model.flops_per_token(9) == pytest.approx(3 * forward / 9, rel=1e-12)


def test_the_forward_pass_is_one_graph_that_does_not_look_at_values(attention: str) -> None:
    """fullgraph refuses every graph break; .item() and branches on values are some."""
    torch.compiler.reset()
    model, inputs_BT, targets_BT = build_random_model(torch.float32, attention=attention), tokens(2, 9), tokens(2, 9)
    n_graphs = 0

    def count_graphs(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal n_graphs
        n_graphs += 1
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=count_graphs)
    for ids_BT in (document_ids(4, 5), document_ids(1, 8), document_ids(3, 3, 3)):
        output = compiled(inputs_BT, targets_BT, ids_BT.expand(2, -1).contiguous())
        expected = model(inputs_BT, targets_BT, ids_BT.expand(2, -1))
        assert_close(output.losses["cross_entropy"], expected.losses["cross_entropy"], torch.float32, "loss")
    assert n_graphs == 1


def test_gradients_do_not_depend_on_how_a_batch_is_cut(attention: str) -> None:
    """Sums of losses over micro-batches give the gradient of the whole batch."""
    model, inputs_BT, targets_BT = build_random_model(attention=attention), tokens(4, 7), tokens(4, 8)[:, 1:]
    model(inputs_BT, targets_BT).losses["cross_entropy"].backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row in range(4):
        model(inputs_BT[row : row + 1], targets_BT[row : row + 1]).losses["cross_entropy"].backward()
    for name, p in model.named_parameters():
        assert_close(p.grad, whole[name], torch.float64, name)


def test_a_block_adds_to_the_residual_stream_before_which_it_normalises(attention: str) -> None:
    model, inputs_BT = build_random_model(attention=attention), tokens(2, 7)
    x_BTD = F.embedding(inputs_BT, model.embedding.weight)
    for block in model.blocks:
        x_BTD = x_BTD + block.attention(F.rms_norm(x_BTD, (32,), block.attention_norm.weight, 1e-5))
        x_BTD = x_BTD + block.feed_forward(F.rms_norm(x_BTD, (32,), block.feed_forward_norm.weight, 1e-5))
    logits_BTV = F.rms_norm(x_BTD, (32,), model.final_norm.weight, 1e-5) @ model.embedding.weight.T
    assert_close(model(inputs_BT).logits_BTV, logits_BTV, torch.float64, "logits")
