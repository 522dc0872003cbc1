"""Tokens per second at equal matmul FLOPs per token, side by side; and how much of the GEMM peak that is."""

import statistics
import tempfile
from typing import Any

from diagnostics.bench.equal_models import Shape, peer_spec, write_batches
from diagnostics.bench.side_by_side import N_SEGMENTS, time_in_turn
from diagnostics.bench.workers import Worker

STEPS_PER_SEGMENT = 3
GATE_STEPS = 20
GATE_BAND = 0.01
"""Relative; the loss of each of the first steps of the fast path against the same run in float32, eager, torch's
attention."""
MAX_LAG_NATS = 1.0
"""A peer whose loss lies further above HYDRA's, on the same batches, does not train what it is said to train."""
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
    segments = time_in_turn(contestants, STEPS_PER_SEGMENT)
    n_common = min(len(worker.losses) for worker in contestants)
    learnt = {worker.name: statistics.mean(worker.losses[n_common - 3 : n_common]) for worker in contestants}
    rows: list[dict[str, Any]] = []
    for name, timed in segments.items():
        row: dict[str, Any] = {"name": name, "loss_nats": learnt[name], "after_steps": n_common}
        if not timed.are_enough:
            row["refused"] = f"only {len(timed.seconds)} segments held"
        elif learnt[name] > learnt[contestants[0].name] + MAX_LAG_NATS:
            row["refused"] = f"does not learn: {learnt[name]:.2f} nats after {n_common} steps"
        else:
            rates = [STEPS_PER_SEGMENT * shape.tokens_per_step / seconds for seconds in timed.seconds]
            used = [
                rate * shape.matmul_flops_per_token / 1e9 / peak
                for rate, peak in zip(rates, timed.peaks_gflops, strict=True)
            ]
            row |= {
                "tokens_per_s": statistics.median(rates),
                "tokens_per_s_all": rates,
                "gemm_peak_gflops": statistics.median(timed.peaks_gflops),
                "share_of_gemm_peak": statistics.median(used),
            }
        rows.append(row)
    own = rows[0].get("tokens_per_s")
    for row in rows[1:]:
        if own and "tokens_per_s" in row:
            row["hydra_is_faster"] = own / row["tokens_per_s"]
    return rows


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
    n_steps = result["contestants"][0]["after_steps"]
    lines += [
        f"| | tokens/s (median of {N_SEGMENTS}) | all | HYDRA is | share of GEMM peak | loss after {n_steps} steps |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["contestants"]:
        if "refused" in row:
            lines.append(f"| {row['name']} | no figure: {row['refused']} | | | | {row['loss_nats']:.2f} |")
            continue
        every = " ".join(f"{value:,.0f}" for value in row["tokens_per_s_all"])
        faster = f"{row['hydra_is_faster']:.2f}x" if "hydra_is_faster" in row else ""
        lines.append(
            f"| {row['name']} | {row['tokens_per_s']:,.0f} | {every} | {faster} | {row['share_of_gemm_peak']:.1%} | "
            f"{row['loss_nats']:.2f} |"
        )
    return lines
