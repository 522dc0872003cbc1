import ast
from pathlib import Path

import hydra

FORBIDDEN = {"item", "tolist", "cpu", "numpy", "nonzero"}
# Sampling and the slow references stand outside of compiled regions.
EXEMPT = {"generation.py", "reference.py", "decoding.py"}


def test_nothing_in_a_forward_pass_asks_a_tensor_for_its_value() -> None:
    """Read from the sources, so that it also holds for branches that no test compiles."""
    root = Path(hydra.__path__[0])
    sources = [path for folder in ("attention", "layers", "model") for path in (root / folder).rglob("*.py")]
    for path in [path for path in sources if path.name not in EXEMPT and not {"tests", "checks"} & {*path.parts}]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in FORBIDDEN, f"{path}:{node.lineno}"
