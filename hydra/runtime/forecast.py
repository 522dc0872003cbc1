"""What a run will take before it is started: memory, tokens, time, disk."""

from dataclasses import dataclass

from hydra.runtime.memory import MemoryPlan

MEASURED_S = 0.2
BYTES_PER_LOGGED_STEP = 900  # a line of metrics.jsonl and the same figures for TensorBoard


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Memory as planned; time as an estimate from a rate of matrix products that was measured just now."""

    memory: MemoryPlan
    n_parameters: int
    n_steps: int
    tokens_per_step: int
    flops_per_token: float
    flops_per_s: float
    """Of this machine, at the model's width and in its dtype."""
    share_of_rate: float
    """Of that rate, which training reaches."""
    overhead_s_per_step: float
    """To call everything: what a step takes however small its matrices are."""
    checkpoint_bytes: int
    n_checkpoints: int
    n_logged_steps: int

    @property
    def n_tokens(self) -> int:
        """Tokens that the run trains on."""
        return self.n_steps * self.tokens_per_step

    @property
    def seconds(self) -> float:
        """An estimate of the time that the steps take."""
        in_products = self.n_tokens * self.flops_per_token / (self.flops_per_s * self.share_of_rate)
        return in_products + self.n_steps * self.overhead_s_per_step

    @property
    def disk_bytes(self) -> int:
        """Checkpoints that are kept, the one that is being written beside them, and the metrics."""
        return (self.n_checkpoints + 1) * self.checkpoint_bytes + self.n_logged_steps * BYTES_PER_LOGGED_STEP


def measure_matrix_rate(n_rows: int, width: int, dtype: str, device: str, n_threads: int) -> float:
    """Floating-point operations per second of (n_rows, width) times (width, 4 width), by a GPU or n_threads threads."""
    import time

    import torch

    n_threads_before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    x = torch.ones(n_rows, width, dtype=getattr(torch, dtype), device=device)
    weight = torch.ones(width, 4 * width, dtype=x.dtype, device=device)
    x @ weight  # the first one loads the library
    best, end = float("inf"), time.perf_counter() + MEASURED_S
    while time.perf_counter() < end:
        began = time.perf_counter()
        x @ weight
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    torch.set_num_threads(n_threads_before)
    return 2 * n_rows * width * 4 * width / best
