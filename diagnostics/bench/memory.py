"""Peak resident memory above what the process had after its imports, at a vocabulary of 32k and 8,192 tokens a step."""

import tempfile
from typing import Any

from diagnostics.bench.equal_models import Shape, peer_spec, write_batches
from diagnostics.bench.workers import Worker

SHAPE = Shape(vocab_size=32_000, n_rows=32)
MICRO_BATCH_ROWS = 8
N_STEPS = 3


def run(data_dir: str, threads: int) -> dict[str, Any]:
    """One process each, a few steps; no timing, so that a busy machine does no harm."""
    # Token ids of the smaller vocabulary are ids of the larger one too; memory does not depend on their values.
    batches = write_batches(Shape(n_rows=SHAPE.n_rows), data_dir)
    spec = peer_spec(SHAPE, batches, threads)
    config = SHAPE.hydra_config(data_dir, threads=threads, micro_batch_size=MICRO_BATCH_ROWS)
    rows = []
    for name, program, extra, is_peer in (
        ("HYDRA", "hydra", {"run_dir": f"{tempfile.mkdtemp()}/run", "config": config}, False),
        ("nanoGPT's CPU recipe", "nanogpt", {}, False),
        ("HF Llama, Trainer, fp32", "hf_llama", {"bf16": False}, True),
        ("HF Llama, Trainer, bf16", "hf_llama", {"bf16": True}, True),
    ):
        worker = Worker.start(name, program, {**spec, **extra}, is_peer=is_peer)
        worker.ask(do="steps", n=N_STEPS)
        answer = worker.ask(do="memory")
        worker.stop()
        rows.append({"name": name, "above_imports_mib": answer["peak_mib"] - answer["baseline_mib"], **answer})
    return {"vocab_size": SHAPE.vocab_size, "tokens_per_step": SHAPE.tokens_per_step, "contestants": rows}


def table(result: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    own = result["contestants"][0]["above_imports_mib"]
    lines = [
        f"Vocabulary {result['vocab_size']:,}, {result['tokens_per_step']:,} tokens per step; HYDRA takes them in "
        f"micro-batches of {MICRO_BATCH_ROWS} rows, its compiler's memory included.",
        "",
        "| | peak above imports, MiB | imports, MiB | HYDRA needs |",
        "|---|---|---|---|",
    ]
    for row in result["contestants"]:
        share = "" if row["name"] == "HYDRA" else f"{own / row['above_imports_mib']:.2f}x"
        lines.append(f"| {row['name']} | {row['above_imports_mib']:,.0f} | {row['baseline_mib']:,.0f} | {share} |")
    return lines
