"""The kernels of hydra.kernels._triton.cca_convolution.

With z = conv0(u) made anew wherever it is read (k0 products a number), conv1 is one matrix product for each of its k1
taps. Backwards: the gradient of z with the shares of conv0's weights, then that of u; conv1's weights on their own.
Sums over tokens are left in pieces by the programs, so that their order never varies.

B batch, T new tokens, R = k0 + k1 - 2 tokens that the convolutions look back, P = R + T places, of which the first
n_missing (R or 0) are not in memory and zero; N query heads, K key/value heads, M = N + K, H head width, C = M H.
I input and O output channels of a head, J = k1 taps, E pieces.
"""

import triton
import triton.language as tl


@triton.jit
def is_same_document(ids_ptr, places, others, is_place, HAS_DOCUMENTS: tl.constexpr):
    """Where is_place holds and the token at `others` belongs to the document of the one at `places`."""
    if HAS_DOCUMENTS:
        return is_place & (tl.load(ids_ptr + places, is_place, other=0) == tl.load(ids_ptr + others, is_place, other=0))
    return is_place


@triton.jit
def convolve_depthwise(
    u_ptr, weight_0_ptr, ids_ptr, places, is_place, channels, is_channel, n_missing, n_channels,
    TAPS_0: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """conv0 without its bias at these places and channels, in float32; zero where is_place does not hold."""
    z = tl.zeros([places.shape[0], channels.shape[0]], dtype=tl.float32)
    for back in tl.static_range(TAPS_0):
        weight = tl.load(weight_0_ptr + channels * TAPS_0 + (TAPS_0 - 1 - back), is_channel, other=0.0).to(tl.float32)
        is_seen = is_same_document(
            ids_ptr, places, places - back, is_place & (places - back >= n_missing), HAS_DOCUMENTS
        )
        u_ptrs = u_ptr + ((places - back - n_missing) * n_channels)[:, None] + channels[None, :]
        z += tl.load(u_ptrs, is_seen[:, None] & is_channel[None, :], other=0.0).to(tl.float32) * weight[None, :]
    return z


@triton.jit
def forward_kernel(
    u_ptr, weight_0_ptr, weight_1_ptr, bias_ptr, ids_ptr, out_ptr, n_tokens, n_missing,
    IS_KEY: tl.constexpr, N_QUERIES: tl.constexpr, N_KEYS: tl.constexpr, WIDTH: tl.constexpr, TAPS_0: tl.constexpr,
    TAPS_1: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries (B, T, N, H) or keys (B, T, K, H): both convolutions and the mean. Weights of conv1 as (J, M, O, I)."""
    N_HEADS: tl.constexpr = N_QUERIES + N_KEYS
    LOOK_BACK: tl.constexpr = TAPS_0 + TAPS_1 - 2
    N_BLOCKS: tl.constexpr = (WIDTH + BLOCK_O - 1) // BLOCK_O
    GROUP: tl.constexpr = N_QUERIES // N_KEYS
    n_channels = N_HEADS * WIDTH
    batch, own_head = tl.program_id(2).to(tl.int64), tl.program_id(1) // N_BLOCKS
    head = own_head + N_QUERIES if IS_KEY else own_head
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row, places = rows < n_tokens, rows + LOOK_BACK
    outputs = (tl.program_id(1) % N_BLOCKS) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_output = outputs < WIDTH
    if HAS_DOCUMENTS:
        ids_ptr += batch * (n_tokens + LOOK_BACK)
    u_ptr += batch * (n_tokens + LOOK_BACK - n_missing) * n_channels

    out = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    for back in tl.static_range(TAPS_1):
        is_seen = is_same_document(ids_ptr, places, places - back, is_row, HAS_DOCUMENTS)
        tap_ptr = weight_1_ptr + ((TAPS_1 - 1 - back) * N_HEADS + head) * WIDTH * WIDTH
        for first in range(0, WIDTH, BLOCK_I):
            inputs = first + tl.arange(0, BLOCK_I)
            is_input = inputs < WIDTH
            z = convolve_depthwise(u_ptr, weight_0_ptr, ids_ptr, places - back, is_seen, head * WIDTH + inputs,
                                   is_input, n_missing, n_channels, TAPS_0, HAS_DOCUMENTS)  # fmt: skip
            is_inside = is_output[:, None] & is_input[None, :]
            weight_OI = tl.load(tap_ptr + outputs[:, None] * WIDTH + inputs[None, :], is_inside, other=0.0)
            out = tl.dot(z.to(weight_OI.dtype), tl.trans(weight_OI), acc=out, input_precision=PRECISION)
    out += tl.load(bias_ptr + head * WIDTH + outputs, is_output, other=0.0)[None, :]

    u_ptrs = u_ptr + ((places - n_missing) * n_channels)[:, None] + outputs[None, :]
    is_inside = is_row[:, None] & is_output[None, :]
    partner = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    if IS_KEY:
        for member in tl.static_range(GROUP):
            query = own_head * GROUP + member
            partner += tl.load(u_ptrs + query * WIDTH, is_inside, other=0.0).to(tl.float32) / GROUP
    else:
        partner += tl.load(u_ptrs + (N_QUERIES + own_head // GROUP) * WIDTH, is_inside, other=0.0).to(tl.float32)
    out += 0.5 * (tl.load(u_ptrs + head * WIDTH, is_inside, other=0.0).to(tl.float32) + partner)
    OWN_HEADS: tl.constexpr = N_KEYS if IS_KEY else N_QUERIES
    out_ptrs = out_ptr + (((batch * n_tokens + rows) * OWN_HEADS + own_head) * WIDTH)[:, None] + outputs[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), is_inside)


@triton.jit
def grad_middle_kernel(
    grad_ptr, u_ptr, weight_1_ptr, ids_ptr, grad_z_ptr, pieces_ptr, n_tokens, n_missing,
    IS_KEY: tl.constexpr, N_QUERIES: tl.constexpr, N_KEYS: tl.constexpr, WIDTH: tl.constexpr, TAPS_0: tl.constexpr,
    TAPS_1: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of z at all places, (B, P, C), and these programs' shares of that of conv0's weights, (E, k0, C)."""
    N_HEADS: tl.constexpr = N_QUERIES + N_KEYS
    LOOK_BACK: tl.constexpr = TAPS_0 + TAPS_1 - 2
    N_BLOCKS: tl.constexpr = (WIDTH + BLOCK_I - 1) // BLOCK_I
    OWN_HEADS: tl.constexpr = N_KEYS if IS_KEY else N_QUERIES
    n_channels, n_places = N_HEADS * WIDTH, n_tokens + LOOK_BACK
    batch, own_head = tl.program_id(2).to(tl.int64), tl.program_id(1) // N_BLOCKS
    head = own_head + N_QUERIES if IS_KEY else own_head
    places = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_place = places < n_places
    inputs = (tl.program_id(1) % N_BLOCKS) * BLOCK_I + tl.arange(0, BLOCK_I)
    is_input = inputs < WIDTH
    if HAS_DOCUMENTS:
        ids_ptr += batch * n_places

    grad_z = tl.zeros([BLOCK_T, BLOCK_I], dtype=tl.float32)
    for back in tl.static_range(TAPS_1):
        rows = places + back - LOOK_BACK
        is_row = is_same_document(ids_ptr, places, places + back, (rows >= 0) & (rows < n_tokens), HAS_DOCUMENTS)
        grad_ptrs = grad_ptr + (((batch * n_tokens + rows) * OWN_HEADS + own_head) * WIDTH)[:, None]
        tap_ptr = weight_1_ptr + ((TAPS_1 - 1 - back) * N_HEADS + head) * WIDTH * WIDTH
        for first in range(0, WIDTH, BLOCK_O):
            outputs = first + tl.arange(0, BLOCK_O)
            is_output = outputs < WIDTH
            grad = tl.load(grad_ptrs + outputs[None, :], is_row[:, None] & is_output[None, :], other=0.0)
            is_inside = is_output[:, None] & is_input[None, :]
            weight_OI = tl.load(tap_ptr + outputs[:, None] * WIDTH + inputs[None, :], is_inside, other=0.0)
            grad_z = tl.dot(grad, weight_OI, acc=grad_z, input_precision=PRECISION)
    channels = head * WIDTH + inputs
    is_inside = is_place[:, None] & is_input[None, :]
    grad_z_ptrs = grad_z_ptr + ((batch * n_places + places) * n_channels)[:, None] + channels[None, :]
    tl.store(grad_z_ptrs, grad_z.to(grad_z_ptr.dtype.element_ty), is_inside)

    u_ptr += batch * (n_places - n_missing) * n_channels
    piece = batch * tl.num_programs(0) + tl.program_id(0)
    for back in tl.static_range(TAPS_0):
        is_seen = is_same_document(
            ids_ptr, places, places - back, is_place & (places - back >= n_missing), HAS_DOCUMENTS
        )
        u_ptrs = u_ptr + ((places - back - n_missing) * n_channels)[:, None] + channels[None, :]
        u = tl.load(u_ptrs, is_seen[:, None] & is_input[None, :], other=0.0).to(tl.float32)
        share_ptrs = pieces_ptr + (piece * TAPS_0 + TAPS_0 - 1 - back) * n_channels + channels
        tl.store(share_ptrs, tl.sum(grad_z * u, axis=0), is_input)


@triton.jit
def grad_input_kernel(
    grad_z_ptr, grad_q_ptr, grad_k_ptr, weight_0_ptr, ids_ptr, grad_u_ptr, n_tokens, n_missing,
    IS_KEY: tl.constexpr, N_QUERIES: tl.constexpr, N_KEYS: tl.constexpr, WIDTH: tl.constexpr, TAPS_0: tl.constexpr,
    TAPS_1: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The gradient of u, (B, P - missing, C), through conv0 and through the mean."""
    LOOK_BACK: tl.constexpr = TAPS_0 + TAPS_1 - 2
    GROUP: tl.constexpr = N_QUERIES // N_KEYS
    n_channels, n_places = (N_QUERIES + N_KEYS) * WIDTH, n_tokens + LOOK_BACK
    batch, own_head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    head = own_head + N_QUERIES if IS_KEY else own_head
    places = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T) + n_missing
    is_place = places < n_places
    columns = tl.arange(0, BLOCK_H)
    is_column = columns < WIDTH
    channels = head * WIDTH + columns
    if HAS_DOCUMENTS:
        ids_ptr += batch * n_places

    grad_u = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    for back in tl.static_range(TAPS_0):
        weight = tl.load(weight_0_ptr + channels * TAPS_0 + (TAPS_0 - 1 - back), is_column, other=0.0).to(tl.float32)
        is_seen = is_same_document(ids_ptr, places, places + back, places + back < n_places, HAS_DOCUMENTS)
        grad_z_ptrs = grad_z_ptr + ((batch * n_places + places + back) * n_channels)[:, None] + channels[None, :]
        grad_z = tl.load(grad_z_ptrs, is_seen[:, None] & is_column[None, :], other=0.0)
        grad_u += grad_z.to(tl.float32) * weight[None, :]

    rows = places - LOOK_BACK
    is_inside = (is_place & (rows >= 0))[:, None] & is_column[None, :]
    q_ptrs = grad_q_ptr + ((batch * n_tokens + rows) * N_QUERIES * WIDTH)[:, None] + columns[None, :]
    k_ptrs = grad_k_ptr + ((batch * n_tokens + rows) * N_KEYS * WIDTH)[:, None] + columns[None, :]
    if IS_KEY:
        grad_u += 0.5 * tl.load(k_ptrs + own_head * WIDTH, is_inside, other=0.0).to(tl.float32)
        for member in tl.static_range(GROUP):
            query = own_head * GROUP + member
            grad_u += 0.5 * tl.load(q_ptrs + query * WIDTH, is_inside, other=0.0).to(tl.float32)
    else:
        grad_u += 0.5 * tl.load(q_ptrs + own_head * WIDTH, is_inside, other=0.0).to(tl.float32)
        grad_u += (0.5 / GROUP) * tl.load(k_ptrs + (own_head // GROUP) * WIDTH, is_inside, other=0.0).to(tl.float32)
    u_rows = (batch * (n_places - n_missing) + places - n_missing) * n_channels
    is_inside = is_place[:, None] & is_column[None, :]
    tl.store(grad_u_ptr + u_rows[:, None] + channels[None, :], grad_u.to(grad_u_ptr.dtype.element_ty), is_inside)


@triton.jit
def grad_weight_kernel(
    grad_ptr, u_ptr, weight_0_ptr, ids_ptr, pieces_ptr, n_batch, n_tokens, n_missing,
    IS_KEY: tl.constexpr, N_QUERIES: tl.constexpr, N_KEYS: tl.constexpr, WIDTH: tl.constexpr, TAPS_0: tl.constexpr,
    TAPS_1: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A piece (E, J, M, O, I) of the gradient of conv1's weights, from every E-th tile of tokens."""
    N_HEADS: tl.constexpr = N_QUERIES + N_KEYS
    LOOK_BACK: tl.constexpr = TAPS_0 + TAPS_1 - 2
    N_BLOCKS_I: tl.constexpr = (WIDTH + BLOCK_I - 1) // BLOCK_I
    N_BLOCKS_O: tl.constexpr = (WIDTH + BLOCK_O - 1) // BLOCK_O
    OWN_HEADS: tl.constexpr = N_KEYS if IS_KEY else N_QUERIES
    n_channels, n_places = N_HEADS * WIDTH, n_tokens + LOOK_BACK
    own_head = tl.program_id(1) // (N_BLOCKS_I * N_BLOCKS_O)
    head = own_head + N_QUERIES if IS_KEY else own_head
    back = tl.program_id(2)
    inputs = (tl.program_id(1) % N_BLOCKS_I) * BLOCK_I + tl.arange(0, BLOCK_I)
    outputs = (tl.program_id(1) // N_BLOCKS_I % N_BLOCKS_O) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_input, is_output = inputs < WIDTH, outputs < WIDTH
    n_tiles = tl.cdiv(n_tokens, BLOCK_T)

    share = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    for tile in range(tl.program_id(0), n_batch * n_tiles, tl.num_programs(0)):
        batch = (tile // n_tiles).to(tl.int64)
        rows = (tile % n_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        is_row, places = rows < n_tokens, rows + LOOK_BACK
        row_ids_ptr = ids_ptr
        if HAS_DOCUMENTS:
            row_ids_ptr += batch * n_places
        is_seen = is_same_document(row_ids_ptr, places, places - back, is_row, HAS_DOCUMENTS)
        row_u_ptr = u_ptr + batch * (n_places - n_missing) * n_channels
        z = convolve_depthwise(row_u_ptr, weight_0_ptr, row_ids_ptr, places - back, is_seen, head * WIDTH + inputs,
                               is_input, n_missing, n_channels, TAPS_0, HAS_DOCUMENTS)  # fmt: skip
        grad_ptrs = grad_ptr + (((batch * n_tokens + rows) * OWN_HEADS + own_head) * WIDTH)[:, None] + outputs[None, :]
        grad = tl.load(grad_ptrs, is_row[:, None] & is_output[None, :], other=0.0)
        share = tl.dot(tl.trans(grad), z.to(grad.dtype), acc=share, input_precision=PRECISION)
    piece = (tl.program_id(0).to(tl.int64) * TAPS_1 + TAPS_1 - 1 - back) * N_HEADS + head
    share_ptrs = pieces_ptr + piece * WIDTH * WIDTH + outputs[:, None] * WIDTH + inputs[None, :]
    tl.store(share_ptrs, share, is_output[:, None] & is_input[None, :])
