"""Whole-process time to the validation loss that nanoGPT's CPU recipe ends with, on the same text, three seeds each.

Both train on the first 90 % of the characters and are judged on the last 10 %, in windows of the recipe's block size,
after the clock has stopped. The evaluation that HYDRA's trainer does at the end of a run, on text that it holds back
from the 90 %, counts for HYDRA. The first of HYDRA's runs finds nothing that an earlier one has left, so it counts
tokens, plans its memory and compiles as well; the others find that done. The recipe's program compiles nothing, and
splits its text by characters in no time.

The races' configs have rates, momentum, warm-up and feed-forward layer that were the best of six tried on the King
James Bible by characters; the number of steps is what the text itself takes.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diagnostics.bench.contestants import nanogpt
from diagnostics.bench.machine import ROOT, wait_until_quiet
from hydra.model.framework import build_model
from hydra.runtime import Run
from scripts.config import TrainingConfig
from scripts.launch import write_config_once

SEEDS = (1, 2, 3)
RECIPE = "nanoGPT's CPU recipe"
RECIPE_PROGRAM = Path(nanogpt.__file__)


@dataclass(frozen=True)
class Race:
    """A recipe of nanoGPT, and the config with which HYDRA is to reach its loss with no more parameters."""

    recipe: dict[str, Any]
    config: dict[str, Any]
    known: str
    """What the recipe's own code is known to give, to be compared with."""
    known_nats: float | None = None
    """Its own final validation loss where it is known: HYDRA must reach that too."""
    seeds: tuple[int, ...] = field(default=SEEDS)


RACES = {
    "characters-0.8M": Race(
        recipe={
            "n_tokens": 64,
            "n_rows": 12,
            "d_model": 128,
            "n_layers": 4,
            "n_heads": 4,
            "dropout": 0.0,
            "learning_rate": 1e-3,
            "warmup_steps": 100,
            "max_steps": 2000,
            "seconds": None,
        },
        # So few steps that compiling, even from a warm cache, takes longer than it saves.
        config={
            "d_model": 128,
            "n_layers": 2,
            "n_heads": 4,
            "feed_forward": "swiglu",
            "d_feed_forward": 384,
            "context_length": 64,
            "batch_size": 32,
            "micro_batch_size": 32,
            "max_steps": 95,
            "warmup_steps": 0,
            "learning_rate": 1e-2,
            "muon_learning_rate": 0.02,
            "muon_momentum": 0.85,
            "validation_fraction": 0.001,
            "compile_from_step": None,
        },
        known="its own code ends at 1.8857 by its estimate on 20 batches, at 1.8982 on the whole validation text",
        known_nats=1.8857,
    ),
    # Dropout is left out: ten minutes see the text once or twice, and dropout would only slow that down.
    "characters-10.7M": Race(
        recipe={
            "n_tokens": 256,
            "n_rows": 16,
            "d_model": 384,
            "n_layers": 6,
            "n_heads": 6,
            "dropout": 0.0,
            "learning_rate": 1e-3,
            "warmup_steps": 100,
            "max_steps": None,
            "seconds": 600.0,
        },
        config={
            "d_model": 384,
            "n_layers": 6,
            "n_heads": 6,
            "d_feed_forward": 1536,
            "context_length": 256,
            "batch_size": 16,
            "micro_batch_size": 16,
            "max_steps": 24,
            "warmup_steps": 0,
            "muon_learning_rate": 0.02,
            "muon_momentum": 0.85,
            "validation_fraction": 0.001,
        },
        known="its own code: 2,860 tokens/s on two Zen 5 cores",
    ),
}


def run(name: str, threads: int, text: Path, stored: dict[str, Any] | None) -> dict[str, Any]:
    """Run a race on the text; contestants take turns, seed by seed.

    Args:
        stored: an earlier result of this race on this kind of machine, whose runs of the recipe stand where they are of
            the same recipe; None: everything is run.
    """
    race = RACES[name]
    whole = text.read_text()
    cut = int(0.9 * len(whole))
    folder = Path(tempfile.mkdtemp(prefix="bench-race-"))
    (folder / "train.txt").write_text(whole[:cut])
    (folder / "validation.txt").write_text(whole[cut:])
    identity = {
        "recipe": race.recipe,
        "threads": threads,
        "text_sha256": hashlib.sha256(whole.encode()).hexdigest(),
        "program_sha256": hashlib.sha256(RECIPE_PROGRAM.read_bytes()).hexdigest(),
    }
    is_known = stored is not None and stored["identity"] == identity
    known_runs = {row["seed"]: row for row in stored["rows"][RECIPE]} if stored and is_known else {}
    rows: dict[str, list[dict[str, float]]] = {RECIPE: [], "HYDRA": []}
    for seed in race.seeds:
        if seed in known_runs:
            rows[RECIPE].append(known_runs[seed])
        else:
            wait_until_quiet()
            rows[RECIPE].append(_run_recipe(race, folder, seed, threads))
        wait_until_quiet()
        rows["HYDRA"].append(_run_hydra(race, folder, seed, threads))
    mean = statistics.mean(row["val_loss_nats"] for row in rows[RECIPE])
    target = min(mean, race.known_nats or mean)
    n_reached = sum(row["val_loss_nats"] <= target for row in rows["HYDRA"])
    is_smaller = rows["HYDRA"][0]["n_parameters"] <= rows[RECIPE][0]["n_parameters"]
    times = {who: statistics.median(row["seconds"] for row in of) for who, of in rows.items()}
    return {
        "identity": identity,
        "target_nats": target,
        "known": race.known,
        "n_runs_of_before": len(known_runs),
        "reached": f"{n_reached} of {len(race.seeds)}",
        "faster": times[RECIPE] / times["HYDRA"] if n_reached == len(race.seeds) and is_smaller else None,
        "rows": rows,
    }


def _run_recipe(race: Race, folder: Path, seed: int, threads: int) -> dict[str, float]:
    texts = {name: str(folder / f"{name.removesuffix('_text')}.txt") for name in ("train_text", "validation_text")}
    spec = {**race.recipe, **texts, "seed": seed, "threads": threads}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "diagnostics.bench.contestants.nanogpt", json.dumps(spec)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    whole = time.perf_counter() - began
    result = json.loads(done.stdout.splitlines()[-1])
    return {"seed": seed, **result, "seconds": whole - result.pop("evaluation_seconds")}


def _run_hydra(race: Race, folder: Path, seed: int, threads: int) -> dict[str, float]:
    run_dir = Path(tempfile.mkdtemp()) / "run"
    fields = {
        "corpus": str(folder / "train.txt"),
        "tokenizer": "characters",
        "data_dir": str(folder / "data"),
        "threads": threads,
        "seed": seed,
        "eval_every": 10**6,
        "checkpoint_every": 10**6,
        "log_every": 50,
        "sample_tokens": 0,
        **race.config,
    }
    write_config_once(TrainingConfig.preset("debug", **fields), run_dir)
    began = time.perf_counter()
    command = [sys.executable, "-m", "scripts.trainer", str(run_dir)]
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    finished = Run.open(run_dir)
    loss = _judge(finished, (folder / "validation.txt").read_text(), race.recipe["n_tokens"])
    return {"seed": seed, "val_loss_nats": loss, "n_parameters": finished.status().n_parameters, "seconds": seconds}


@torch.no_grad()
def _judge(run: Run, text: str, n_tokens: int) -> float:
    """Mean loss in nats per character over whole windows of n_tokens, as the recipe's own program takes it."""
    model, tokenizer = run.load_model(build_model), run.load_tokenizer()
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    assert len(ids) == len(text), "a character of the validation text is not in the training text"
    windows = nanogpt.cut_windows(ids, n_tokens)
    total = sum(model(i, t).losses["cross_entropy"].item() for i, t in windows)
    return total / sum(i.numel() for i, _ in windows)


def table(result: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    faster = (
        f"{result['faster']:.1f}x sooner"
        if result["faster"]
        else "no figure, since not every seed reached it with no more parameters"
    )
    before = f"; {result['n_runs_of_before']} of its runs are of before" if result["n_runs_of_before"] else ""
    lines = [
        f"Target {result['target_nats']:.4f} nats per character, the lower of the mean of the recipe's seeds and of "
        f"what is known ({result['known']}{before}). HYDRA: {faster}; {result['reached']} seeds reached it.",
        "",
        "| | parameters | whole process, s | validation loss, nats |",
        "|---|---|---|---|",
    ]
    for who, rows in result["rows"].items():
        seconds = " ".join(f"{row['seconds']:.1f}" for row in rows)
        losses = " ".join(f"{row['val_loss_nats']:.4f}" for row in rows)
        lines.append(f"| {who} | {rows[0]['n_parameters']:,.0f} | {seconds} | {losses} |")
    return lines
