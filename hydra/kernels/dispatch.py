"""Which implementation of the operators in hydra.kernels serves a model: `torch` or `triton`.

It is chosen once, before a model is built, and then travels as a plain value (`kernels`) from Execution to the modules
that call operators. An operator that is asked for `triton` runs the Triton kernel or raises; nothing falls back.
"""

import importlib.util

from hydra.errors import ConfigError

KERNELS = ("torch", "triton")
"""`torch`: torch's own operators, which torch.compile fuses. `triton`: the kernels in hydra/kernels/_triton."""


def choose_kernels(device_type: str, *, is_compiled: bool, has_linear_attention: bool) -> tuple[str, str]:
    """What `auto` stands for on a device (`cpu` or `cuda`), and why; what was measured is in this folder's README.

    Args:
        device_type: `cpu` or `cuda`.
        is_compiled: whether torch's compiler will fuse what torch's own operators leave apart.
        has_linear_attention: whether there are layers that torch's compiler makes little of.
    """
    if device_type != "cuda":
        return "torch", "Triton's kernels are for GPUs"
    if not is_triton_installed():
        return "torch", "triton is not installed"
    if is_compiled and not has_linear_attention:
        return "torch", "compiled, torch's own operators were faster on an H100"
    return "triton", "on an H100 they were faster for what is not compiled, and for linear attention"


def check_kernels(kernels: str, device_type: str) -> None:
    """Return if `kernels` (one of KERNELS) can serve tensors on a device (`cpu` or `cuda`) of this machine.

    Raises:
        ConfigError: there is no such implementation, triton is not installed, or the device is a CPU and triton was
            not imported as its interpreter.
    """
    if kernels not in KERNELS:
        raise ConfigError(f"kernels must be one of {', '.join(KERNELS)}, but got kernels={kernels!r}; use one of them")
    if kernels == "torch":
        return
    if not is_triton_installed():
        raise ConfigError(
            "triton must be installed for kernels=triton, but it cannot be imported; pip install triton (Linux), or "
            "ask for kernels=torch"
        )
    if device_type == "cpu":
        # Nothing in hydra needs triton to be imported.
        from hydra.kernels._triton.launch import IS_INTERPRETED

        if not IS_INTERPRETED:
            raise ConfigError(
                "kernels=triton must have a GPU, but got device=cpu; ask for kernels=torch there (tests run the "
                "kernels on a CPU by setting TRITON_INTERPRET=1 before triton is imported)"
            )


def is_triton_installed() -> bool:
    """Whether `import triton` would find a package; it is not imported."""
    return importlib.util.find_spec("triton") is not None
