"""The plan before a run, and the prediction beside the peak that was measured."""

import json
from collections.abc import Callable

from bs4 import BeautifulSoup

from hydra.notebook.figures import memory_section, plan_section
from hydra.runtime import Run, RunStatus
from hydra.runtime.forecast import BYTES_PER_LOGGED_STEP, Forecast
from hydra.runtime.memory import MemoryPlan, Prediction
from hydra.runtime.memory.plan import Rung

MIB = 2**20
PLAN = MemoryPlan(
    micro_batch_size=2,
    n_micro_batches=4,
    activation_checkpointing="selective",
    prediction=Prediction(
        parameters=100 * MIB,
        gradients=50 * MIB,
        optimizer=200 * MIB,
        activations=300 * MIB,
        temporaries=25 * MIB,
        allocator=25 * MIB,
        process=300 * MIB,
    ),
    limit_bytes=2000 * MIB,
    limit_source="/sys/fs/cgroup/job",
    tried=((Rung(8, "none"), 4000 * MIB), (Rung(2, "selective"), 1000 * MIB)),
)


def test_plan_section() -> None:
    forecast = Forecast(
        memory=PLAN,
        n_parameters=10_000_000,
        n_steps=1000,
        tokens_per_step=2048,
        flops_per_token=6e7,
        flops_per_s=2e11,
        share_of_rate=0.5,
        overhead_s_per_step=0.25,
        checkpoint_bytes=120_000_000,
        n_checkpoints=2,
        n_logged_steps=100,
    )
    assert forecast.seconds == 1000 * 2048 * 6e7 / 1e11 + 1000 * 0.25
    assert forecast.disk_bytes == 360_000_000 + 100 * BYTES_PER_LOGGED_STEP
    section = plan_section(forecast)
    text = BeautifulSoup(section.to_html(), "html.parser").get_text(" ")
    for said in ("1,000 of 2,000 MiB (/sys/fs/cgroup/job)", "4 x 2 rows", "selective", "2,048,000 in 1,000 steps"):
        assert said in section.text and said in text, said
    for said in ("an estimate", "24 min 39 s", "50% of the 200 GFLOP/s", "360 MB", "activations", "300 MiB"):
        assert said in text, said
    assert "8 rows, checkpointing none" in text and "4,000 MiB" in text


def test_memory_section(make_run: Callable[..., Run], done_status: RunStatus) -> None:
    run = make_run(done_status)
    assert memory_section(run).text == "No memory has been planned."
    (run.directory / "memory.json").write_text(json.dumps(PLAN.to_dict()))
    (run.directory / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "peak_mem_mib": 900.0 + n}) + "\n" for n in (10, 60))
    )
    section = memory_section(run)
    assert section.text == "Predicted peak 1,000 MiB, measured 960 MiB: 1.04 of it."
    cells = [cell.get_text() for cell in BeautifulSoup(section.body, "html.parser").find_all(["th", "td"])]
    assert cells[cells.index("predicted over measured") + 1] == "1.04"
