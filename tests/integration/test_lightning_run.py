"""A run of lightning beside softmax attention: it trains, and what it learned continues text."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from hydra.model.framework import Decoder, build_model, generate
from hydra.runtime import Run


def test_a_plan_of_lightning_and_gqa_learns_and_decodes(
    make_run: Callable[..., Path], start_trainer: Callable[[Path], "subprocess.Popen[str]"]
) -> None:
    """The slopes of its layers differ; the Decoder's states move on in static shapes."""
    run_dir = make_run("lightning", attention="3*lightning, gqa", n_layers=4, max_steps=40, compile_from_step=None)
    _, errors = (process := start_trainer(run_dir)).communicate(timeout=300)
    assert process.returncode == 0, errors
    run = Run.open(run_dir)
    losses = [record["loss_nats"] for record in run.metrics() if "loss_nats" in record]
    assert losses[-1] < 0.8 * losses[0], losses
    model = run.load_model(build_model).float()
    prompts = [[1, 2, 3, 4, 5], [7]]
    decoder = Decoder(model, max_tokens=24, n_streams=2, implementation="reference")
    expected = [generate(model, prompt, 12, temperature=0.0) for prompt in prompts]
    assert decoder.generate(prompts, 12, temperature=0.0) == expected
