"""build_model: from a ModelSpec to an initialised HydraModel."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hydra.attention.code import load_copies
from hydra.kernels.dispatch import check_kernels
from hydra.model.framework.execution import Execution
from hydra.model.framework.initialisation import initialise
from hydra.model.framework.model import HydraModel
from hydra.model.framework.spec import ModelSpec


def build_model(
    spec: ModelSpec | Mapping[str, Any],
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    execution: Execution | None = None,
    code_dir: Path | None = None,
) -> HydraModel:
    """Build a model and initialise it; the global random state is neither read nor changed.

    Built on the meta device first, so that memory is taken once and a parameter that was not initialised cannot hide
    behind a library's default.

    Args:
        spec: what to build; a mapping is what ModelSpec.to_dict gave, as a checkpoint carries it.
        seed: of the initial weights; each parameter depends on it and on the parameter's name only.
        device, dtype: where the parameters shall live, and as what.
        execution: how to compute; left out, what runs everywhere.
        code_dir: a folder that is trusted to hold the code of the spec's classes by path. Left out, only code runs
            whose file was named in this process.
    Raises:
        ConfigError: a spec that cannot be; code that nobody vouched for, or that is not what the spec says; a device
            that cannot have the kernels that `execution` names.
    """
    if execution is not None:
        check_kernels(execution.kernels, torch.device(device).type)
    if not isinstance(spec, ModelSpec):
        spec = ModelSpec.from_dict(spec)
    if code_dir is not None:
        load_copies(spec.attention_code, code_dir)
    with torch.device("meta"):
        model = HydraModel(spec, execution)
    model = model.to(dtype).to_empty(device=device)
    initialise(model, seed, spec)
    return model
