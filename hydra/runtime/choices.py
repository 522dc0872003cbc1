"""What is chosen once for a run, from `auto` and this machine, and then stays."""

import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict

from hydra.errors import ConfigError
from hydra.runtime.environment import describe_session, record_choices, record_session

logger = logging.getLogger(__name__)
# glibc's malloc.h
MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a run computes with, in every session of it."""

    device: str
    """`cpu` or `cuda`."""
    threads: int
    """CPU threads of one operation."""
    dtype: str = "float32"
    """Numbers of matrix products and activations: `float32` or `bfloat16`. (Runs of before had float32.)"""
    attention_kernel: str = "scaled_dot_product"
    """The kernel of softmax attention, as hydra.attention names them."""
    kernels: str = "torch"
    """What serves the other operators, as hydra.kernels.dispatch names them. (Runs of before had torch's.)"""
    micro_batch_size: int = 0
    """Rows of one forward and backward pass; 0 until memory has been planned."""
    activation_checkpointing: str = "none"
    """What blocks keep for their backward pass, as hydra.model.framework.Execution names it."""
    optimizer_offload: bool = False
    """Whether float32 weights and optimizer state are in the host's memory while the model is on a GPU."""


class AskedChoices(TypedDict):
    """Arguments of `choose_once` and `resolve`, which say what they mean."""

    device: str
    threads: int
    dtype: str
    attention_kernel: str
    choose_attention_kernel: Callable[[str], tuple[str, str]] | None
    kernels: str
    choose_kernels: Callable[[str], tuple[str, str]] | None


def choose_once(
    run_dir: Path,
    *,
    device: str,
    threads: int,
    dtype: str = "float32",
    attention_kernel: str = "scaled_dot_product",
    choose_attention_kernel: Callable[[str], tuple[str, str]] | None = None,
    kernels: str = "torch",
    choose_kernels: Callable[[str], tuple[str, str]] | None = None,
) -> Choices:
    """The run's choices: those of its first session, or now those that are asked for, on this machine.

    Records this session in environment.json.

    Args:
        device: `auto`, `cpu` or `cuda`.
        threads: 0 for all cores that this process may use.
        dtype: `auto`, `float32` or `bfloat16`.
        attention_kernel, kernels: `auto` or a name.
        choose_attention_kernel, choose_kernels: from the device to what computes there, and why; refuse what cannot.

    Raises:
        ConfigError: the run computes on a device that this machine does not have.
    """
    now, reasons = resolve(
        device=device,
        threads=threads,
        dtype=dtype,
        attention_kernel=attention_kernel,
        choose_attention_kernel=choose_attention_kernel,
        kernels=kernels,
        choose_kernels=choose_kernels,
    )
    choices = Choices(**record_session(run_dir, describe_session(), asdict(now)))
    if replace(choices, micro_batch_size=0, activation_checkpointing="none", optimizer_offload=False) == now:
        logger.info("computing with %s (%s)", choices, reasons)
    else:
        logger.info("computing with %s (as the run's first session chose)", choices)
    check_device(choices.device)
    return choices


def resolve(
    *,
    device: str,
    threads: int,
    dtype: str,
    attention_kernel: str,
    choose_attention_kernel: Callable[[str], tuple[str, str]] | None,
    kernels: str,
    choose_kernels: Callable[[str], tuple[str, str]] | None,
) -> tuple[Choices, str]:
    """What is asked for, with `auto` resolved on this machine, and the reasons; arguments as those of `choose_once`.

    Raises:
        ConfigError: it is a device that this machine does not have, or a kernel that cannot compute there.
    """
    import torch

    check_device(device)
    resolved_device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    resolved_dtype, dtype_reason = choose_dtype(resolved_device) if dtype == "auto" else (dtype, "asked for")
    kernel_reason = operators_reason = "asked for"
    if choose_attention_kernel is not None:
        attention_kernel, kernel_reason = choose_attention_kernel(resolved_device)
    if choose_kernels is not None:
        kernels, operators_reason = choose_kernels(resolved_device)
    now = Choices(
        device=resolved_device,
        threads=threads or len(os.sched_getaffinity(0)),
        dtype=resolved_dtype,
        attention_kernel=attention_kernel,
        kernels=kernels,
    )
    return now, f"dtype: {dtype_reason}; attention_kernel: {kernel_reason}; kernels: {operators_reason}"


def settle(
    run_dir: Path,
    choices: Choices,
    *,
    micro_batch_size: int,
    activation_checkpointing: str,
    optimizer_offload: bool = False,
) -> Choices:
    """`choices` with what planning the memory chose, from now on those of the run."""
    settled = replace(
        choices,
        micro_batch_size=micro_batch_size,
        activation_checkpointing=activation_checkpointing,
        optimizer_offload=optimizer_offload,
    )
    record_choices(run_dir, asdict(settled))
    return settled


def choose_dtype(device: str) -> tuple[str, str]:
    """What `auto` stands for on a device of this machine, and why."""
    import torch

    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU has bfloat16 matrix units"
        return "float32", "the GPU has no bfloat16 matrix units"
    # Without such instructions a bfloat16 product can be 50 times slower than a float32 one.
    if torch.cpu._is_amx_tile_supported():
        return "bfloat16", "the processor has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "bfloat16", "the processor has AVX512-BF16"
    return "float32", "the processor has neither AVX512-BF16 nor AMX"


def check_device(device: str) -> None:
    """Return if `device` (`auto`, `cpu` or `cuda`) can be had on this machine.

    Raises:
        ConfigError: it cannot.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                f"device must be one that this machine has, but got cuda, and torch {torch.__version__} sees no GPU "
                "here; use device auto or cpu for a new run, or go on with this one where there is a GPU"
            )


def keep_freed_memory() -> None:
    """Let the C library keep what was freed instead of giving it back to the system, page by page, in every step.

    A step frees and takes the same activations again. By default glibc maps each large one anew, and the page faults
    take about a sixth of a step (measured: 12 M parameters, 4,096 tokens). Where the C library is another, nothing
    happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MALLOPT_MMAP_THRESHOLD, 2**30)
        mallopt(MALLOPT_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Let the C library give back what is free at this moment: once, after work of another kind than a training step.

    Preparing the default corpus leaves half a GiB of it. Where the C library is another, nothing happens.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def set_up_torch(choices: Choices, seed: int, compile_cache: Path) -> None:
    """Make this process compute the same from the same, seed the global generators, and keep compiled code."""
    import torch

    from hydra.runtime.random_state import seed_all

    # cuBLAS is deterministic only with a workspace of fixed size; read when the first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Compiled code outlives the run, and a reboot; read when torch's compiler is imported.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compile_cache))
    # A pool of compiling processes takes longer to start than the few regions of a model take to compile.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # What /proc/cpuinfo lists is taken, without compiling and loading a probe for each: a second in every process.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    keep_freed_memory()
    torch.set_num_threads(choices.threads)
    # torch.use_deterministic_algorithms does this and tells torch's compiler, whose import takes a second: that is left
    # for whoever compiles.
    torch._C._set_deterministic_algorithms(True)
    # Deterministic mode would also fill every fresh tensor; nothing here reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    seed_all(seed)
