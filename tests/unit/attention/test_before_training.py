"""What is looked at before a run trains a class of one's own: what is refused, with which words, and what is not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hydra.attention import build_spec, record_plan_code
from hydra.attention.checks.before_training import check_before_training, find_problem
from hydra.errors import ConfigError

ROOT = Path(__file__).parents[3]
PLANTED = ROOT / "tests" / "unit" / "testing" / "planted.py"
BROKEN = ROOT / "tests" / "unit" / "testing" / "broken.py"
EXAMPLES = ROOT / "notebooks" / "examples" / "attention_classes"


def check(
    *names: str, context_length: int = 256, d_model: int = 32, n_heads: int = 4, options: dict[str, Any] | None = None
) -> None:
    """Of a model with a layer of each."""
    code = record_plan_code(", ".join(names), {}, ROOT)
    shape: dict[str, Any] = {"d_model": d_model, "n_heads": n_heads, "n_layers": len(names), "options": options or {}}
    specs = [build_spec(name, code, layer_index=index, **shape) for index, name in enumerate(names)]
    check_before_training(specs, context_length)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{PLANTED}:SeesTheNextToken", r"causality by perturbation: .* \(smallest T = 2\)"),
        (f"{PLANTED}:SeesItsWholeChunk", r"causality by perturbation: .* \(smallest T = 18\)"),
        (f"{PLANTED}:SeesAQuarterOfTheRow", r"causality by perturbation: .* \(smallest T = 8\)"),
        (f"{PLANTED}:IgnoresDocuments", r"documents: .* \(smallest T = 2\)"),
        (f"{PLANTED}:SeesDocumentsWithSmallerIds", r"documents: .* \(smallest T = 2\)"),
        (f"{BROKEN}:TakesBlocksAndSeesTheNextToken", r"causality by perturbation: .* \(smallest T = 128\)"),
        (f"{BROKEN}:Raises", r"forward: raises ZeroDivisionError: division by zero, at broken.py:\d+ `return 1 / num"),
        (f"{BROKEN}:GivesNaN", r"not finite: gives NaN or infinity \(smallest T = 2\)"),
        (f"{BROKEN}:IsTooNarrow", r"output shape: gives \(2, 2, 31\) for \(2, 2, 32\) \(smallest T = 2\)"),
        (f"{BROKEN}:CannotBeBuilt", r"a layer must be built from its spec, but .*'d_modl', at broken.py:\d+ `self"),
        (f"{BROKEN}:RaisesAtDocuments", r"documents: raises KeyError: 7, at broken.py:\d+ `return"),
    ],
    ids=lambda text: text.split(":")[-1].split(" ")[0],
)
def test_it_is_refused_with_what_to_do(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*python -m hydra.testing {name}$"):
        check("gqa", name)


@pytest.mark.parametrize(
    "name",
    [
        f"{PLANTED}:Right",
        f"{PLANTED}:ComputesInSinglePrecision",
        # The card finds more: that is for the researcher to weigh.
        f"{PLANTED}:KeepsItsLastKeys",
        f"{PLANTED}:PairsTokens",
        f"{PLANTED}:CountsPlacesAndNotPositions",
        f"{PLANTED}:DropsOutInEvaluation",
        f"{BROKEN}:MultipliesInFloat32",
        f"{EXAMPLES}/sigmoid.py:SigmoidAttention",
        f"{EXAMPLES}/gated_recurrence.py:GatedRecurrence",
        f"{EXAMPLES}/convolution.py:ConvolutionMixer",
    ],
    ids=lambda name: name.split(":")[-1],
)
def test_no_false_alarm(name: str) -> None:
    check(name)
    check(name, d_model=48, n_heads=2, context_length=32)


def test_layers_are_those_of_the_run() -> None:
    """Place, widths and options, which the command repeats; of one kind the first."""
    check(f"{BROKEN}:LearnsOfItsPlace", "gqa", "gqa")
    with pytest.raises(ConfigError, match="causality"):
        check("gqa", f"{BROKEN}:LearnsOfItsPlace", "gqa")
    with pytest.raises(ConfigError, match=r"gives \(2, 2, 23\) for \(2, 2, 24\)"):
        check(f"{BROKEN}:IsTooNarrow", d_model=24)


def test_the_command_takes_the_options(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from torch import nn\n"
        "class Mine(nn.Module):\n"
        "    options = {'shift': 1, 'is_sharp': True}\n"
        "    def __init__(self, spec):\n"
        "        super().__init__()\n"
        "        self.proj = nn.Linear(spec.d_model, spec.d_model)\n"
        "        self.shift = spec.options['shift']\n"
        "    def forward(self, x, places, ids):\n"
        "        return self.proj(x.roll(self.shift, 1) if self.shift else x)\n"
    )
    check(f"{path}:Mine", options={"shift": 0})
    with pytest.raises(ConfigError, match=rf"python -m hydra.testing '{path}:Mine\(shift=-1, is_sharp=True\)'$"):
        check(f"{path}:Mine", options={"shift": -1})


def test_nothing_of_the_process_is_changed() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    n_threads = torch.get_num_threads()
    find_problem.cache_clear()
    check(f"{PLANTED}:Right", d_model=16)
    assert torch.equal(torch.rand(4), expected)
    assert torch.get_num_threads() == n_threads
    assert find_problem.cache_info().misses == 1
    check(f"{PLANTED}:Right", f"{PLANTED}:Right", d_model=16)  # another number of layers, but one kind
    assert find_problem.cache_info().misses == 2
    check(f"{PLANTED}:Right", f"{PLANTED}:Right", d_model=16)
    assert find_problem.cache_info().misses == 2
