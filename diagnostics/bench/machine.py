"""The machine under the benchmark: what it is, and whether it is quiet enough to time anything."""

import importlib.metadata
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra.runtime.environment import describe_session

ROOT = Path(__file__).parents[2]
WATCHED_S = 1.0
MAX_FOREIGN_SHARE = 0.10
"""Processor time that others may take, as a share of one core, before timing is refused."""
PATIENCE_S = 120.0


class BusyError(Exception):
    """Others use the processor; a timing would measure them too."""


@dataclass(frozen=True)
class Watch:
    """What others use of the processor from now on."""

    began: float
    before: dict[tuple[str, str], float]

    @classmethod
    def start(cls) -> "Watch":
        """Begin to watch."""
        return cls(time.monotonic(), {process: used for process, _, used in _processor_seconds()})

    def busy(self) -> dict[str, float]:
        """Who used more than MAX_FOREIGN_SHARE of a core since then, with the share."""
        passed = time.monotonic() - self.began
        shares = [
            (f"{name} [{process[0]}]", (used - self.before.get(process, 0.0)) / passed)
            for process, name, used in _processor_seconds()
        ]
        return {name: share for name, share in shares if share > MAX_FOREIGN_SHARE}


def wait_until_quiet() -> None:
    """Return when nothing but this process and its children has used the processor for a second.

    Raises:
        BusyError: that was not so for two minutes; it names who is at work.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        watch = Watch.start()
        time.sleep(WATCHED_S)
        busy = watch.busy()
        if not busy:
            return
        if time.monotonic() > deadline:
            raise BusyError(
                f"the machine must be quiet to time anything, but at work are: {told(busy)}; end them or wait"
            )


def told(busy: dict[str, float]) -> str:
    """Who is at work, in words."""
    return ", ".join(f"{name} ({share:.0%} of a core)" for name, share in busy.items())


def _processor_seconds() -> Iterator[tuple[tuple[str, str], str, float]]:
    """Number and start, name, and processor time of every process that is not ours.

    A name tells no process from another: a kernel thread's changes with what it does.
    """
    ticks, own = os.sysconf("SC_CLK_TCK"), str(os.getpid())
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue  # it has ended
        fields = rest.split()
        if own not in (entry.name, fields[1]):
            yield (entry.name, fields[19]), name, (int(fields[11]) + int(fields[12])) / ticks


def describe() -> dict[str, object]:
    """Processor, cores, versions and commit, as they stand beside every figure."""
    import torch

    session = describe_session()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    family = [line.partition(":")[2].strip() for line in lines if line.startswith("cpu family")][:1]
    model = [line.partition(":")[2].strip() for line in lines if line.startswith("model\t")][:1]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{session['cpu']} (family {'/'.join(family + model)})",
        "n_cores": session["n_cores"],
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "python": session["python"],
        "torch": torch.__version__,
        "hydra": importlib.metadata.version("hydra-workspace"),
        "commit": str(session["git_commit"])[:7],
    }


def is_same(one: dict[str, object], other: dict[str, object]) -> bool:
    """Whether two descriptions are of the same kind of machine with the same torch."""
    return all(one[name] == other[name] for name in ("processor", "n_cores", "torch"))
