"""Writing the safetensors format in pieces. Reading it is left to its library.

The library writes a whole file in one call, which no other thread can take over, and which leaves the file to be read
once more for its hash. The format: eight bytes with the length of the header (little-endian), the header (JSON: dtype,
shape and place of every tensor, padded with spaces to a multiple of eight), then the tensors one after the other.
"""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PIECE_BYTES = 2**20
ALIGNMENT = 8
# As the format calls torch's dtypes.
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def safetensors_pieces(tensors: Mapping[str, "Tensor"]) -> Iterator[memoryview]:
    """The file that holds `tensors`, at most PIECE_BYTES at a time; no contiguous tensor on the CPU is copied.

    Raises:
        KeyError: a tensor has a dtype that is not in DTYPES.
    """
    # Wide numbers first, so that every tensor begins at a multiple of its number's width.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    yield memoryview(_header(ordered))
    for tensor in ordered.values():
        content = _bytes_of(tensor)
        for start in range(0, len(content), PIECE_BYTES):
            yield content[start : start + PIECE_BYTES]


def _header(tensors: Mapping[str, "Tensor"]) -> bytes:
    described, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        described[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


def _bytes_of(tensor: "Tensor") -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
