"""Lightning attention: one kernel carries the state over the chunks, one mixes the tokens of every chunk.

Both serve the forward pass and all gradients, which have the form of the operator itself. With D the gradient of the
outputs, M_ts = exp(-slope (t - s)) for s <= t of one document, S the state before a chunk and E the gradient of the
state behind it:

    out = (q k^T * M) v + decay * (q S)           dk = (v D^T * M^T) q + decay * (v E^T)
    dq  = (D v^T * M) k + decay * (D S^T)         dv = (k q^T * M^T) D + decay * (k E)

S gathers keys and values forwards; E gathers queries and D backwards, in the same way.

B batch, T tokens, P = 1 + T, N heads, H head width, J chunks.
"""

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hydra.errors import ConfigError
from hydra.kernels._triton.launch import AotCase, check_inputs

MAX_HEAD_WIDTH = 256
STATE_STAGES, MIX_STAGES = 3, 2


@dataclasses.dataclass(frozen=True)
class Launch:
    """How both kernels cut their work."""

    chunk: int
    """Tokens of a chunk: of about a head's width, pairs of tokens cost as much as the products with the state."""
    block: int
    """Channels of a head that a program holds at a time."""
    precision: str
    """How products of float32 are computed: as three of tf32 each, which keeps their digits and uses matrix units."""


def choose_launch(width: int, dtype: torch.dtype) -> Launch:
    """For heads of this width. Operands of tf32 products come in two parts each: registers hold half as many."""
    most = 32 if dtype == torch.float32 else 64
    block = min(max(triton.next_power_of_2(width), 16), most)
    return Launch(chunk=most, block=block, precision="tf32x3" if dtype == torch.float32 else "ieee")


@triton.jit
def decay_to_state(
    ids_ptr, batch, start, rows, n_tokens, slope, BEHIND: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, CHUNK: tl.constexpr
):
    """What remains between each token of a chunk and the state behind the chunk (or before it); 0 across documents."""
    length = tl.minimum(n_tokens - start, CHUNK)
    distance = length - 1 - rows if BEHIND else rows + 1
    is_seen = rows < length
    if HAS_DOCUMENTS:
        # The place of a token is one further on: the first is that of the token before the row.
        ids_ptr += batch * (n_tokens + 1) + start
        ids = tl.load(ids_ptr + 1 + rows, is_seen, other=0)
        is_seen = is_seen & (ids == tl.load(ids_ptr + (length if BEHIND else 0)))
    return tl.where(is_seen, tl.exp(-slope * tl.maximum(distance, 0).to(tl.float32)), 0.0)


@triton.jit
def state_kernel(
    x_ptr, y_ptr, slopes_ptr, ids_ptr, initial_ptr, states_ptr, final_ptr, n_tokens, n_heads, n_chunks,
    REVERSED: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S <- decay S + (decay * x)^T y chunk after chunk, in float32; states (B, N, J, H, H) keep what each chunk meets.

    One program: BLOCK x BLOCK of the state of one head of one row. REVERSED: from the last chunk to the first.
    """
    batch, head = (tl.program_id(0) // n_heads).to(tl.int64), tl.program_id(0) % n_heads
    x_columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y_columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    is_x_column, is_y_column = (x_columns < WIDTH)[None, :], (y_columns < WIDTH)[None, :]
    rows = tl.arange(0, CHUNK)
    slope = tl.load(slopes_ptr + head)
    offsets = x_columns[:, None] * WIDTH + y_columns[None, :]
    is_inside = (x_columns < WIDTH)[:, None] & is_y_column
    program = batch * n_heads + head

    state = tl.load(initial_ptr + program * WIDTH * WIDTH + offsets, is_inside, other=0.0)
    for step in range(n_chunks):
        chunk = n_chunks - 1 - step if REVERSED else step
        start = chunk * CHUNK
        kept_ptr = states_ptr + (program * n_chunks + chunk) * WIDTH * WIDTH
        tl.store(kept_ptr + offsets, state.to(states_ptr.dtype.element_ty), is_inside)

        length = tl.minimum(n_tokens - start, CHUNK)
        through = tl.exp(-slope * length.to(tl.float32))
        if HAS_DOCUMENTS:
            before_ptr = ids_ptr + batch * (n_tokens + 1) + start
            through = tl.where(tl.load(before_ptr) == tl.load(before_ptr + length), through, 0.0)
        decay = decay_to_state(ids_ptr, batch, start, rows, n_tokens, slope, not REVERSED, HAS_DOCUMENTS, CHUNK)
        tokens = (((batch * n_tokens + start + rows) * n_heads + head) * WIDTH)[:, None]
        is_token = (rows < length)[:, None]
        x = tl.load(x_ptr + tokens + x_columns[None, :], is_token & is_x_column, other=0.0)
        y = tl.load(y_ptr + tokens + y_columns[None, :], is_token & is_y_column, other=0.0)
        x = (x.to(tl.float32) * decay[:, None]).to(x.dtype)
        state = tl.dot(tl.trans(x), y, acc=state * through, input_precision=PRECISION)
    tl.store(final_ptr + program * WIDTH * WIDTH + offsets, state, is_inside)


@triton.jit
def mix_kernel(
    a_ptr, b_ptr, c_ptr, states_ptr, slopes_ptr, ids_ptr, out_ptr, n_tokens, n_heads, n_chunks,
    REVERSED: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = (a b^T * M) c + decay * (a S): what a chunk's tokens take from each other and from the state they meet.

    One program: BLOCK channels of one chunk of one head. REVERSED: M^T, and the state behind. TRANSPOSED: S^T.
    """
    # Heads and chunks share the one axis of a grid that may be longer than 65,535.
    chunk, program = tl.program_id(0) % n_chunks, tl.program_id(0) // n_chunks
    batch, head = (program // n_heads).to(tl.int64), program % n_heads
    start = chunk * CHUNK
    rows = tl.arange(0, CHUNK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slope = tl.load(slopes_ptr + head)
    tokens = (((batch * n_tokens + start + rows) * n_heads + head) * WIDTH)[:, None]
    is_row = rows < n_tokens - start
    is_token, is_column = is_row[:, None], (columns < WIDTH)[None, :]
    states_ptr += ((batch * n_heads + head) * n_chunks + chunk) * WIDTH * WIDTH

    scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    from_state = tl.zeros([CHUNK, BLOCK], dtype=tl.float32)
    for first in range(0, WIDTH, BLOCK):
        channels = first + tl.arange(0, BLOCK)
        is_channel = channels < WIDTH
        a = tl.load(a_ptr + tokens + channels[None, :], is_token & is_channel[None, :], other=0.0)
        b = tl.load(b_ptr + tokens + channels[None, :], is_token & is_channel[None, :], other=0.0)
        if TRANSPOSED:
            offsets = columns[:, None] * WIDTH + channels[None, :]
            state = tl.load(states_ptr + offsets, (columns < WIDTH)[:, None] & is_channel[None, :], other=0.0)
            state = tl.trans(state)
        else:
            offsets = channels[:, None] * WIDTH + columns[None, :]
            state = tl.load(states_ptr + offsets, is_channel[:, None] & is_column, other=0.0)
        scores = tl.dot(a, tl.trans(b), acc=scores, input_precision=PRECISION)
        from_state = tl.dot(a, state, acc=from_state, input_precision=PRECISION)

    distance = rows[None, :] - rows[:, None] if REVERSED else rows[:, None] - rows[None, :]
    is_seen = distance >= 0
    if HAS_DOCUMENTS:
        ids = tl.load(ids_ptr + batch * (n_tokens + 1) + start + 1 + rows, is_row, other=0)
        is_seen = is_seen & (ids[:, None] == ids[None, :])
    scores = tl.where(is_seen, scores * tl.exp(-slope * tl.maximum(distance, 0).to(tl.float32)), 0.0)
    decay = decay_to_state(ids_ptr, batch, start, rows, n_tokens, slope, REVERSED, HAS_DOCUMENTS, CHUNK)
    c = tl.load(c_ptr + tokens + columns[None, :], is_token & is_column, other=0.0)
    out = tl.dot(scores.to(c.dtype), c, acc=from_state * decay[:, None], input_precision=PRECISION)
    tl.store(out_ptr + tokens + columns[None, :], out.to(out_ptr.dtype.element_ty), is_token & is_column)


def _gather(
    x_BTNH: Tensor, y_BTNH: Tensor, slopes_N: Tensor, ids_BP: Tensor | None, initial_BNHH: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """states_BNJHH that the chunks meet, in the dtype of x, and the one behind them all, in float32."""
    n_batch, n_tokens, n_heads, width = x_BTNH.shape
    launch = choose_launch(width, x_BTNH.dtype)
    n_chunks, n_blocks = triton.cdiv(n_tokens, launch.chunk), triton.cdiv(width, launch.block)
    states_BNJHH = x_BTNH.new_empty(n_batch, n_heads, n_chunks, width, width)
    final_BNHH = x_BTNH.new_empty(n_batch, n_heads, width, width, dtype=torch.float32)
    state_kernel[(n_batch * n_heads, n_blocks, n_blocks)](
        x_BTNH, y_BTNH, slopes_N, ids_BP, initial_BNHH, states_BNJHH, final_BNHH, n_tokens, n_heads, n_chunks,
        REVERSED=reverse, HAS_DOCUMENTS=ids_BP is not None, WIDTH=width,
        CHUNK=launch.chunk, BLOCK=launch.block, PRECISION=launch.precision, num_warps=4, num_stages=STATE_STAGES,
    )  # fmt: skip
    return states_BNJHH, final_BNHH


def _mix(
    a_BTNH: Tensor, b_BTNH: Tensor, c_BTNH: Tensor, states_BNJHH: Tensor, slopes_N: Tensor, ids_BP: Tensor | None,
    reverse: bool = False, transpose: bool = False,
) -> Tensor:  # fmt: skip
    """One line of the table at the top of this file."""
    n_batch, n_tokens, n_heads, width = a_BTNH.shape
    launch, n_chunks = choose_launch(width, a_BTNH.dtype), states_BNJHH.shape[2]
    out_BTNH = torch.empty_like(a_BTNH)
    mix_kernel[(n_batch * n_heads * n_chunks, triton.cdiv(width, launch.block))](
        a_BTNH, b_BTNH, c_BTNH, states_BNJHH, slopes_N, ids_BP, out_BTNH, n_tokens, n_heads, n_chunks,
        REVERSED=reverse, TRANSPOSED=transpose, HAS_DOCUMENTS=ids_BP is not None, WIDTH=width,
        CHUNK=launch.chunk, BLOCK=launch.block, PRECISION=launch.precision, num_warps=4, num_stages=MIX_STAGES,
    )  # fmt: skip
    return out_BTNH


@torch.library.custom_op("hydra::lightning_attention", mutates_args=())
def lightning_attention_op(
    q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, slopes_N: Tensor, ids_BP: Tensor | None, state_BNHH: Tensor
) -> tuple[Tensor, Tensor]:
    """out_BTNH in the dtype of q, contiguous, and the state behind the last token in float32."""
    q_BTNH, k_BTNH, v_BTNH = (x.contiguous() for x in (q_BTNH, k_BTNH, v_BTNH))
    states_BNJHH, final_BNHH = _gather(k_BTNH, v_BTNH, slopes_N, ids_BP, state_BNHH, reverse=False)
    return _mix(q_BTNH, k_BTNH, v_BTNH, states_BNJHH, slopes_N, ids_BP), final_BNHH


@lightning_attention_op.register_fake
def _(
    q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, slopes_N: Tensor, ids_BP: Tensor | None, state_BNHH: Tensor
) -> tuple[Tensor, Tensor]:
    n_batch, _, n_heads, width = q_BTNH.shape
    final_BNHH = q_BTNH.new_empty(n_batch, n_heads, width, width, dtype=torch.float32)
    return torch.empty_like(q_BTNH, memory_format=torch.contiguous_format), final_BNHH


@torch.library.custom_op("hydra::lightning_attention_backward", mutates_args=())
def lightning_attention_backward_op(
    grad_BTNH: Tensor, grad_final_BNHH: Tensor, q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, slopes_N: Tensor,
    ids_BP: Tensor | None, state_BNHH: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v (contiguous, in their dtype) and of the state before the first token (float32)."""
    grad, q, k, v = (x.contiguous() for x in (grad_BTNH, q_BTNH, k_BTNH, v_BTNH))
    # The states are made again: kept, they would be more than q, k and v together.
    states_BNJHH, _ = _gather(k, v, slopes_N, ids_BP, state_BNHH, reverse=False)
    grad_q = _mix(grad, v, k, states_BNJHH, slopes_N, ids_BP, transpose=True)
    states_BNJHH, grad_initial = _gather(q, grad, slopes_N, ids_BP, grad_final_BNHH.contiguous(), reverse=True)
    grad_k = _mix(v, grad, q, states_BNJHH, slopes_N, ids_BP, reverse=True, transpose=True)
    grad_v = _mix(k, q, grad, states_BNJHH, slopes_N, ids_BP, reverse=True)
    return grad_q, grad_k, grad_v, grad_initial


@lightning_attention_backward_op.register_fake
def _(
    grad_BTNH: Tensor, grad_final_BNHH: Tensor, q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, slopes_N: Tensor,
    ids_BP: Tensor | None, state_BNHH: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grad_q, grad_k, grad_v = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTNH, k_BTNH, v_BTNH)
    )
    return grad_q, grad_k, grad_v, torch.empty_like(grad_final_BNHH, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_BTNH: Tensor, grad_final_BNHH: Tensor) -> tuple[Tensor | None, ...]:
    grads = lightning_attention_backward_op(grad_BTNH, grad_final_BNHH, *ctx.saved_tensors)
    return *grads[:3], None, None, grads[3]


lightning_attention_op.register_autograd(_backward, setup_context=_setup_context)


def lightning_attention(
    q_BTNH: Tensor, k_BTNH: Tensor, v_BTNH: Tensor, slopes_N: Tensor, document_ids_BP: Tensor | None,
    state_BNHH: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See hydra.kernels.lightning_attention.

    Raises:
        ConfigError: a dtype is not float32, float16 or bfloat16, or heads are wider than MAX_HEAD_WIDTH.
    """
    check_inputs("lightning_attention", q=q_BTNH, k=k_BTNH, v=v_BTNH)
    if q_BTNH.shape[-1] > MAX_HEAD_WIDTH:
        raise ConfigError(
            f"lightning_attention must get heads of at most {MAX_HEAD_WIDTH} channels from kernels=triton, but got "
            f"{q_BTNH.shape[-1]}; ask for kernels=torch"
        )
    ids_BP = None if document_ids_BP is None else document_ids_BP.contiguous()
    return lightning_attention_op(q_BTNH, k_BTNH, v_BTNH, slopes_N.float(), ids_BP, state_BNHH.contiguous())


def aot_cases() -> list[AotCase]:
    """All forms for packed rows at head widths 64 and 128 in bfloat16; one of each in float32, and at width 256."""
    cases = []
    sizes: dict[str, str | int | float] = {"n_tokens": 4096, "n_heads": 16, "n_chunks": 64}
    all_forms = [(reverse, transpose) for reverse in (False, True) for transpose in (False, True)]
    for width, dtype, forms in [
        (64, "bf16", all_forms), (128, "bf16", all_forms), (256, "bf16", all_forms[:1]), (64, "fp32", all_forms[:1])
    ]:  # fmt: skip
        launch = choose_launch(width, torch.float32 if dtype == "fp32" else torch.bfloat16)
        # Tiles of 32 are too small for the instructions of a whole warp group.
        instruction = "mma.sync" if dtype == "fp32" else "dot"
        constants = {
            "HAS_DOCUMENTS": True, "WIDTH": width, "CHUNK": launch.chunk, "BLOCK": launch.block,
            "PRECISION": launch.precision,
        }  # fmt: skip
        x, shared = f"*{dtype}", {"slopes_ptr": "*fp32", "ids_ptr": "*i64", **sizes}
        gather = {"x_ptr": x, "y_ptr": x, "initial_ptr": "*fp32", "states_ptr": x, "final_ptr": "*fp32", **shared}
        mix = {"a_ptr": x, "b_ptr": x, "c_ptr": x, "states_ptr": x, "out_ptr": x, **shared}
        for reverse, transpose in forms:
            form = {"REVERSED": reverse, "TRANSPOSED": transpose, **constants}
            label = f"{dtype} H={width} {'reversed' if reverse else ''} {'transposed' if transpose else ''}".strip()
            cases.append(AotCase(mix_kernel, mix, form, 4, MIX_STAGES, instruction, label))
            if not transpose:
                form = {"REVERSED": reverse, **constants}
                cases.append(AotCase(state_kernel, gather, form, 4, STATE_STAGES, instruction, label))
    return cases
