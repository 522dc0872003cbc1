"""What is chosen once for a run, from `auto` and this machine, and then stays: device and threads."""

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from hydra.errors import ConfigError
from hydra.runtime.environment import describe_session, record_session

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Device (`cpu` or `cuda`) and CPU threads of one operation."""

    device: str
    threads: int


def choose_once(run_dir: Path, *, device: str, threads: int) -> Choices:
    """The run's choices: those of its first session, or now those for `device` (may be `auto`) and `threads` (0: all).

    Records this session in environment.json.

    Raises:
        ConfigError: the run computes on a device that this machine does not have.
    """
    import torch

    check_device(device)
    now = Choices(
        device=("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device,
        threads=threads or len(os.sched_getaffinity(0)),
    )
    choices = Choices(**record_session(run_dir, describe_session(), asdict(now)))
    logger.info("computing with %s (asked for: device=%s, threads=%d)", choices, device, threads)
    check_device(choices.device)
    return choices


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


def set_up_torch(choices: Choices, seed: int) -> None:
    """Make this process compute the same from the same, and seed torch's global generator."""
    import torch

    # cuBLAS is deterministic only with a workspace of fixed size; read when the first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(choices.threads)
    torch.use_deterministic_algorithms(True)
    # Deterministic mode would also fill every fresh tensor; nothing here reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)
