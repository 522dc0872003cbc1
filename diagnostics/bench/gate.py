"""The contestants' side of a benchmark: a training loop that steps only when the harness asks for it.

Needs torch and nothing of HYDRA, so that programs in the peers' environment can use it.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Gate:
    """Stands in a contestant's loop: `wait` before each step, `done` after it.

    Commands come as JSON lines on standard input and are answered on standard output:
    calibrate (GEMM rate at given shapes), steps (how many to take), memory, stop.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        """Made when everything is imported and nothing is built; spec has `gemm_shapes` and `threads`."""
        torch.set_num_threads(spec["threads"])
        self._baseline_mib = self._kept_peak_mib = peak_resident_mib()
        self._shapes: list[list[int]] = spec["gemm_shapes"]
        self._remaining = 0
        self._began: float | None = None
        self._losses: list[float] = []
        # Libraries print; the answers must stand alone.
        self._answers, sys.stdout = sys.stdout, sys.stderr

    def wait(self) -> None:
        """Return when the next step may be taken; ends the process when the harness says stop."""
        while self._remaining == 0:
            if self._began is not None:
                self._answer({"seconds": time.perf_counter() - self._began, "losses": self._losses})
                self._began, self._losses = None, []
            command = json.loads(sys.stdin.readline() or '{"do": "stop"}')
            if command["do"] == "steps":
                self._remaining, self._began = command["n"], time.perf_counter()
            elif command["do"] == "calibrate":
                self._answer({"gflops": [gemm_gflops(*shape) for shape in self._shapes]})
            elif command["do"] == "memory":
                peak_mib = max(self._kept_peak_mib, peak_resident_mib())
                self._answer({"peak_mib": peak_mib, "baseline_mib": self._baseline_mib})
            else:
                sys.exit(0)
        self._remaining -= 1

    def keep_peak(self) -> None:
        """To be called before the program resets the system's own account of its peak."""
        self._kept_peak_mib = max(self._kept_peak_mib, peak_resident_mib())

    def done(self, loss_nats: float) -> None:
        """Report the loss of the step that was taken."""
        self._losses.append(loss_nats)

    def _answer(self, value: dict[str, Any]) -> None:
        self._answers.write(json.dumps(value) + "\n")
        self._answers.flush()


def decode_at_gate(
    gate: Gate,
    spec: dict[str, Any],
    continue_prompt: Callable[[list[int], int], list[int]],
    exact_logits: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Continue one prompt again and again; what is reported of each is how far its worst token lies from greedy.

    Args:
        continue_prompt: from token ids and the number of new ones to the new ones.
        exact_logits: from ids [1, T] to logits [1, T, V] of the same weights, in float32 and without a cache.
    """
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(spec["vocab_size"], (spec["n_prompt"],), generator=generator).tolist()
    judged: list[int] = []
    regret = 0.0
    while True:
        gate.wait()
        new_ids = continue_prompt(prompt, spec["n_new"])
        assert len(new_ids) == spec["n_new"], f"{spec['n_new']} new tokens were asked for, but {len(new_ids)} came"
        if new_ids != judged:  # the same tokens need not be judged twice, and so the clock does not see it
            judged, regret = new_ids, largest_regret(prompt, new_ids, exact_logits)
        gate.done(regret)


@torch.no_grad()
def largest_regret(
    prompt: list[int], new_ids: list[int], exact_logits: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """How far the log-probability of a new token lies below that of the best one at its place; the worst, in nats."""
    logits_TV = exact_logits(torch.tensor([prompt + new_ids[:-1]]))[0, len(prompt) - 1 :].float()
    chosen_T = logits_TV.gather(-1, torch.tensor(new_ids)[:, None])[:, 0]
    return float((logits_TV.amax(-1) - chosen_T).max())


def peak_resident_mib() -> float:
    """Largest resident memory of this program so far. (ru_maxrss would also count what its parent held at the fork.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


@torch.no_grad()
def gemm_gflops(n_rows: int, n_inner: int, n_columns: int) -> float:
    """Rate of the bfloat16 product [rows, inner] x [columns, inner]^T, GFLOP/s: median of 9 rounds of about 20 ms."""
    x, weight = torch.randn(n_rows, n_inner).bfloat16(), torch.randn(n_columns, n_inner).bfloat16()
    flops = 2.0 * n_rows * n_inner * n_columns
    x @ weight.T
    began = time.perf_counter()
    x @ weight.T
    n_calls = max(1, round(0.02 / (time.perf_counter() - began)))
    rates = []
    for _ in range(9):
        began = time.perf_counter()
        for _ in range(n_calls):
            x @ weight.T
        rates.append(flops * n_calls / (time.perf_counter() - began) / 1e9)
    return statistics.median(rates)
