"""The card tells what is wrong with a class that has one mistake, and finds nothing in those that have none."""

import subprocess
import sys
from pathlib import Path

import pytest

from hydra.attention import available_backends
from hydra.errors import ConfigError
from hydra.testing import check_attention

ROOT = Path(__file__).parents[3]
PLANTED = Path(__file__).with_name("planted.py")
BROKEN = Path(__file__).with_name("broken.py")
EXAMPLES = ROOT / "notebooks" / "examples" / "attention_classes"
# Class of planted.py: the property that does not hold, and the smallest T at which it is seen.
MISTAKES = {
    "SeesTheNextToken": ("causality by perturbation", 2),
    "SeesItsWholeChunk": ("causality by gradient", 18),
    "ConvolvesBothWays": ("causality by gradient", 2),
    "SeesAQuarterOfTheRow": ("causality by perturbation", 8),
    "IgnoresDocuments": ("documents", 2),
    "SeesDocumentsWithSmallerIds": ("documents", 2),
    "ShiftsValuesAcrossDocuments": ("documents", 2),
    "TakesTheFirstRowsDocuments": ("padding", 2),
    "CountsPlacesAndNotPositions": ("positions", 2),
    "CarriesStateFromRowToRow": ("batch independence", 1),
    "NormalisesOverTheBatch": ("batch independence", 1),
    "NormalisesOverTime": ("prefix agreement", 2),
    "DividesByTheLength": ("prefix agreement", 2),
    "ScalesByTheWidth": ("scale", 4),
    "ScalesByNothing": ("scale", 4),
    "ScalesByTheModelsWidth": ("scale", 4),
    "OverflowsInExp": ("bfloat16", 1),
    "AddsUpInLowPrecision": ("bfloat16", 2),
    "KeepsItsLastKeys": ("state between calls", 2),
    "DropsOutInEvaluation": ("determinism", 1),
    "HasAnIdleParameter": ("gradient to every parameter", 33),
    "CutsAGradient": ("gradcheck", 3),
    "RegistersAMask": ("state dict", None),
    "AsksForANumber": ("graph breaks", None),
    "SqueezesOneToken": ("T = 1", 1),
    "PairsTokens": ("odd lengths", 1),
    "DoesNotSeeItself": ("not finite", 1),
}


@pytest.mark.parametrize(("name", "expected"), MISTAKES.items(), ids=MISTAKES)
def test_a_planted_mistake_is_found(name: str, expected: tuple[str, int | None]) -> None:
    card = check_attention(f"{PLANTED}:{name}")
    assert not card.ok
    assert expected in [(finding.property, finding.smallest_t) for finding in card.findings], str(card)
    assert f"{expected[0]}: " in str(card)
    if name == "AsksForANumber":
        numbered = enumerate(PLANTED.read_text().splitlines(), start=1)
        (line,) = [number for number, text in numbered if ".item()" in text]
        assert f"planted.py:{line} `if scores_BNTS.max().item()" in str(card)


def test_every_planted_class_is_looked_at() -> None:
    classes = {
        line.split("(")[0].removeprefix("class ") for line in PLANTED.read_text().splitlines() if line[:5] == "class"
    }
    assert classes == {*MISTAKES, "Right", "ComputesInSinglePrecision"}


def place_in_broken(name: str) -> str:
    """File, line and text of what raises in a class of broken.py."""
    numbered = enumerate(BROKEN.read_text().splitlines(), start=1)
    (found,) = [(number, text.strip()) for number, text in numbered if text.endswith(f"# here: {name}")]
    return f"broken.py:{found[0]} `{found[1]}`"


@pytest.mark.parametrize(
    ("name", "property_name", "what"),
    [
        ("Raises", "forward", f"raises ZeroDivisionError: division by zero, at {place_in_broken('Raises')}"),
        ("GivesNaN", "not finite", "gives NaN or infinity"),
        ("IsTooNarrow", "output shape", "gives (2, 1, 31) for (2, 1, 32)"),
        ("GivesATuple", "output", "gives no tensor but a tuple"),
        ("WidensNumbers", "output dtype", "gives torch.complex64 for torch.float64"),
    ],
)
def test_what_means_nothing_does_not_hold(name: str, property_name: str, what: str) -> None:
    card = check_attention(f"{BROKEN}:{name}")
    assert not card.ok
    assert [(finding.property, finding.what) for finding in card.findings] == [
        (property_name, f"{what}, at every length")
    ]
    rows = dict(card.rows)
    first, others = rows.pop("T = 1, odd and other lengths"), rows
    assert first.startswith(f"FAILS: {property_name}: {what}, at every length")
    assert others.pop("cache")
    if name == "Raises":
        what = f"raises ZeroDivisionError, at {place_in_broken(name).split(' ')[0]}"
    assert others.keys() >= {"causality", "documents", "gradcheck in float64", "graph", "FLOPs", "order and positions"}
    assert set(others.values()) == {f"not run: forward {what}"}
    assert str(card).count(" `return 1 / number") == (2 if name == "Raises" else 0)  # its row, and the list


def test_lengths_that_do_not_run_are_said_to_be_left_out() -> None:
    rows = dict(check_attention(f"{PLANTED}:PairsTokens").rows)
    assert rows["causality"] == "holds, at lengths that run"
    assert dict(check_attention(f"{PLANTED}:Right").rows)["causality"] == "holds"


def test_one_mistake_is_one_finding() -> None:
    """The same line that raises in several checks."""
    card = check_attention(f"{BROKEN}:RaisesAtDocuments")
    place = place_in_broken("RaisesAtDocuments")
    assert f"documents: raises KeyError: 7, at {place}" in str(card.findings[0])
    whats = [finding.what for finding in card.findings]
    assert len(whats) == len(set(whats))
    assert dict(card.rows)["left padding"] == f"not run: raises KeyError, at {place.split(' ')[0]}, as above"


@pytest.mark.parametrize(
    "name",
    [
        *available_backends(),
        f"{PLANTED}:Right",
        f"{PLANTED}:ComputesInSinglePrecision",
        f"{EXAMPLES}/sigmoid.py:SigmoidAttention",
        f"{EXAMPLES}/gated_recurrence.py:GatedRecurrence",
        f"{EXAMPLES}/convolution.py:ConvolutionMixer",
    ],
    ids=lambda name: name.split("/")[-1],
)
def test_no_false_alarm(name: str) -> None:
    card = check_attention(name)
    assert card.ok, str(card)
    assert card.seconds < 60


def test_options_reach_the_class_and_its_cost() -> None:
    name = f"{EXAMPLES}/convolution.py:ConvolutionMixer"
    card = check_attention(name, options={"kernel_size": 3})
    assert card.ok, str(card)
    rows = dict(card.rows)
    assert rows["FLOPs"].startswith("6,144 T + 0.0 T^2")  # three matrices of 32 x 32
    assert rows["cache"].startswith("72 bytes a token in bfloat16, recompute cache")
    with pytest.raises(ConfigError, match="did you mean 'kernel_size'"):
        check_attention(name, options={"kernel_siz": 3})


def test_the_command_prints_the_card() -> None:
    def run(name: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "hydra.testing", name]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    done = run("notebooks/examples/attention_classes/convolution.py:ConvolutionMixer(kernel_size=2)")
    assert done.returncode == 0, done.stderr
    assert "everything holds" in done.stdout
    assert not done.stderr
    done = run(f"{PLANTED}:Nobody")
    assert (done.returncode, done.stdout) == (2, "")
    assert "class of planted.py must be one of Right" in done.stderr
    done = run(f"{BROKEN}:CannotBeBuilt")
    assert (done.returncode, done.stdout) == (2, "")
    place = place_in_broken("CannotBeBuilt")
    assert done.stderr == (
        "a layer must be built from its spec, but CannotBeBuilt(spec) raises AttributeError: 'CustomSpec' object has "
        f"no attribute 'd_modl', at {place}; correct it\n"
    )
