"""A pass over a decode step's graph: products of the same input become one call. Importing this imports the compiler.

Queries, keys and values, or gate and up, are matrices of one x. Together they start the threads once, and an x in fixed
point is made once. A step has tens of them, each of a few microseconds.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from hydra.kernels import decode
from hydra.kernels._cpp import build


class JoinProducts(CustomGraphPass):
    """For inductor's option post_grad_custom_pre_pass; needs hydra.kernels.decode.load_native."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite the graph in place."""
        by_input: defaultdict[tuple[Node, torch.dtype], list[Node]] = defaultdict(list)
        for product in graph.find_nodes(op="call_function", target=torch.ops.hydra.decode_linear.default):
            x, matrices = _operands(product)
            # What the graph is given is there before the first product; anything else might not be.
            if all(matrix.op == "placeholder" for matrix in matrices):
                by_input[x, matrices[0].meta["val"].dtype].append(product)
        for products in by_input.values():
            if len(products) > 1:
                _join(graph, products)

    def uuid(self) -> Any:
        """What compiled code is kept under."""
        return get_hash_for_files((__file__, decode.__file__, str(Path(build.__file__).with_name("decode.cpp"))))


def _operands(product: Node) -> tuple[Node, list[Node]]:
    x, matrices = product.args
    return cast("Node", x), cast("list[Node]", matrices)


def _join(graph: Graph, products: list[Node]) -> None:
    values = [product.meta["val"] for product in products]
    with graph.inserting_before(products[0]):
        x, matrices = products[0].args[0], [matrix for product in products for matrix in _operands(product)[1]]
        joint = graph.call_function(torch.ops.hydra.decode_linear.default, (x, matrices))
        joint.meta["val"] = values[0].new_empty(sum(value.numel() for value in values))
        start = 0
        for product, value in zip(products, values, strict=True):
            stop = start + value.numel()
            piece = graph.call_function(torch.ops.aten.slice.Tensor, (joint, 0, start, stop))
            piece.meta["val"] = joint.meta["val"][start:stop]
            product.replace_all_uses_with(piece)
            start = stop
    for product in products:
        graph.erase_node(product)
