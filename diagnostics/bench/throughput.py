"""Tokens per second at equal matmul FLOPs per token, side by side; and how much of the GEMM peak that is."""

import statistics
import tempfile
from typing import Any

from diagnostics.bench.equal_models import Shape, peer_spec, write_batches
from diagnostics.bench.machine import wait_until_quiet
from diagnostics.bench.workers import Worker

N_PAIRS = 5
STEPS_PER_SEGMENT = 3
MAX_DRIFT = 0.05
"""A segment counts only if the GEMM rates before and after it differ by no more than this."""
MAX_TRIES = 4
GATE_STEPS = 20
GATE_BAND = 0.01
"""Relative; the loss of each of the first steps of the fast path against the same run in float32, eager, torch's
attention."""
REFERENCE = {"dtype": "float32", "attention_kernel": "scaled_dot_product", "compile_from_step": None}


def run(data_dir: str, threads: int) -> dict[str, Any]:
    """Measure; the result goes to benchmarks.json as it is."""
    shape = Shape()
    batches = write_batches(shape, data_dir)
    spec = peer_spec(shape, batches, threads)

    def hydra(name: str, **fields: object) -> Worker:
        config = shape.hydra_config(data_dir, threads=threads, **fields)
        return Worker.start(name, "hydra", {**spec, "run_dir": f"{tempfile.mkdtemp()}/run", "config": config})

    fast, reference = hydra("HYDRA"), hydra("HYDRA, reference", **REFERENCE)
    losses = {worker.name: worker.ask(do="steps", n=GATE_STEPS)["losses"] for worker in (fast, reference)}
    reference.stop()
    pairs = zip(losses["HYDRA"], losses["HYDRA, reference"], strict=True)
    deviation = max(abs(a - b) / b for a, b in pairs)
    result: dict[str, Any] = {
        "matmul_mflops_per_token": shape.matmul_flops_per_token / 1e6,
        "tokens_per_step": shape.tokens_per_step,
        "gate": {"steps": GATE_STEPS, "band": GATE_BAND, "largest_relative_deviation": deviation},
    }
    if deviation > GATE_BAND:
        fast.stop()
        return {**result, "refused": "the fast path's losses leave the reference's band: no figure"}

    contestants = [
        fast,
        Worker.start("nanoGPT's CPU recipe", "nanogpt", spec),
        Worker.start("HF Llama, Trainer, fp32", "hf_llama", {**spec, "bf16": False}, is_peer=True),
        Worker.start("HF Llama, Trainer, bf16", "hf_llama", {**spec, "bf16": True}, is_peer=True),
        Worker.start("litgpt, bf16-mixed, compiled", "litgpt", spec, is_peer=True),
    ]
    try:
        return {**result, "contestants": _time(contestants, shape)}
    finally:
        for worker in contestants:
            worker.stop()


def _time(contestants: list[Worker], shape: Shape) -> list[dict[str, Any]]:
    for worker in contestants:
        worker.ask(do="steps", n=2)  # compiles, allocates
    rates: dict[str, list[float]] = {worker.name: [] for worker in contestants}
    shares: dict[str, list[float]] = {worker.name: [] for worker in contestants}
    losses: dict[str, list[float]] = {worker.name: [] for worker in contestants}
    thrown_away = 0
    for _ in range(N_PAIRS):
        for worker in contestants:
            for _ in range(MAX_TRIES):
                wait_until_quiet()
                before = max(worker.ask(do="calibrate")["gflops"])
                segment = worker.ask(do="steps", n=STEPS_PER_SEGMENT)
                after = max(worker.ask(do="calibrate")["gflops"])
                losses[worker.name] += segment["losses"]
                if abs(before - after) <= MAX_DRIFT * max(before, after):
                    break
                thrown_away += 1
                print(f"thrown away: {worker.name}, GEMM {before:.0f} GFLOP/s before and {after:.0f} after")
            else:
                continue
            rate = STEPS_PER_SEGMENT * shape.tokens_per_step / segment["seconds"]
            rates[worker.name].append(rate)
            shares[worker.name].append(rate * shape.matmul_flops_per_token / 1e9 / ((before + after) / 2))
    own = statistics.median(rates["HYDRA"])
    print(f"{thrown_away} segments were thrown away because their calibrations differed by more than {MAX_DRIFT:.0%}")
    return [
        {
            "name": name,
            "tokens_per_s": statistics.median(values),
            "tokens_per_s_all": values,
            "hydra_is_faster": own / statistics.median(values),
            "share_of_gemm_peak": statistics.median(shares[name]),
            "last_loss_nats": losses[name][-1],
        }
        for name, values in rates.items()
        if values
    ]


def table(result: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    gate = result["gate"]
    lines = [
        f"{result['matmul_mflops_per_token']:.1f} matmul MFLOP per token for every contestant, AdamW, "
        f"{result['tokens_per_step']:,} tokens per step, T = 256. Correctness gate: over {gate['steps']} steps the "
        f"fast path's losses differ from the float32 reference's by at most {gate['largest_relative_deviation']:.2%} "
        f"(band {gate['band']:.0%}).",
        "",
    ]
    if "refused" in result:
        return [*lines, f"Refused: {result['refused']}."]
    lines += ["| | tokens/s (median of 5) | all | HYDRA is | share of GEMM peak |", "|---|---|---|---|---|"]
    for row in result["contestants"]:
        every = " ".join(f"{value:,.0f}" for value in row["tokens_per_s_all"])
        faster = "" if row["name"] == "HYDRA" else f"{row['hydra_is_faster']:.2f}x"
        lines.append(
            f"| {row['name']} | {row['tokens_per_s']:,.0f} | {every} | {faster} | {row['share_of_gemm_peak']:.1%} |"
        )
    return lines
