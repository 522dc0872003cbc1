"""New tokens per second of one stream, greedy, from a cache: HYDRA's decoding beside transformers' generate."""

import statistics
from typing import Any

from diagnostics.bench.equal_models import Shape, peer_spec, write_batches
from diagnostics.bench.side_by_side import N_SEGMENTS, time_in_turn
from diagnostics.bench.workers import Worker

N_PROMPT, N_NEW = 32, 224
CALLS_PER_SEGMENT = 2
BAND_NATS = 0.1
"""How far the log-probability of a chosen token may lie below that of the best one, both by the same weights in float32
without a cache. (A token drawn at random lies 1.5 nats below.)"""
OWN = {"HYDRA, bf16": "decoder", "HYDRA, int8": "int8", "HYDRA, bf16, generate()": "generate"}
PEERS = {"HF generate, bf16": "bfloat16", "HF generate, fp32": "float32"}


def run(data_dir: str, threads: int) -> dict[str, Any]:
    """Measure; the result goes to benchmarks.json as it is."""
    shape = Shape(n_rows=1)
    spec = {
        **peer_spec(shape, write_batches(Shape(), data_dir), threads),
        "config": {**shape.hydra_config("data"), "tie_embeddings": True},
        "n_prompt": N_PROMPT,
        "n_new": N_NEW,
    }
    contestants = [
        *(Worker.start(name, "hydra_decode", {**spec, "variant": variant}) for name, variant in OWN.items()),
        *(Worker.start(name, "hf_decode", {**spec, "dtype": dtype}, is_peer=True) for name, dtype in PEERS.items()),
    ]
    try:
        for worker in contestants:
            worker.ask(do="steps", n=1)  # compiles, allocates, and judges what came out
        segments = time_in_turn(contestants, CALLS_PER_SEGMENT)
    finally:
        for worker in contestants:
            worker.stop()
    rows: list[dict[str, Any]] = []
    for worker in contestants:
        timed, regret = segments[worker.name], max(worker.losses)
        row: dict[str, Any] = {"name": worker.name, "largest_regret_nats": regret}
        if regret > BAND_NATS:
            row["refused"] = f"a token lies {regret:.3f} nats below the best one"
        elif not timed.are_enough:
            row["refused"] = f"only {len(timed.seconds)} segments held"
        else:
            rates = [CALLS_PER_SEGMENT * N_NEW / seconds for seconds in timed.seconds]
            row |= {"tokens_per_s": statistics.median(rates), "tokens_per_s_all": rates}
        rows.append(row)
    return {"n_prompt": N_PROMPT, "n_new": N_NEW, "contestants": rows}


def table(result: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        f"12.2 M parameters, one stream, prompt of {result['n_prompt']} tokens, {result['n_new']} new ones, greedy, "
        "prefill included, compilation not. Gate: a chosen token's log-probability lies at most "
        f"{BAND_NATS} nats below the best one's, by the same weights in float32 without a cache.",
        "",
        f"| | new tokens/s (median of {N_SEGMENTS}) | all | times HF bf16 | largest lag, nats |",
        "|---|---|---|---|---|",
    ]
    figures = {row["name"]: row.get("tokens_per_s") for row in result["contestants"]}
    peer = figures["HF generate, bf16"]
    for row in result["contestants"]:
        if "refused" in row:
            lines.append(f"| {row['name']} | no figure: {row['refused']} | | | {row['largest_regret_nats']:.4f} |")
            continue
        every = " ".join(f"{value:,.0f}" for value in row["tokens_per_s_all"])
        times = f"{row['tokens_per_s'] / peer:.2f}x" if peer else ""
        lines.append(
            f"| {row['name']} | {row['tokens_per_s']:,.0f} | {every} | {times} | {row['largest_regret_nats']:.4f} |"
        )
    return lines
