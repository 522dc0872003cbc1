"""The sections of a notebook and its report. Each reads the run directory only, and says when there is nothing yet."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from hydra.notebook.markup import Section, empty_section, escape, facts, figure, format_bytes, format_number, table
from hydra.notebook.progress import format_duration
from hydra.runtime import Run
from hydra.runtime.memory import MemoryPlan

if TYPE_CHECKING:
    from hydra.runtime.forecast import Forecast

MIB = 2**20
YARDSTICKS = {
    "unigram_bits_per_byte": "unigram model",
    "bigram_bits_per_byte": "bigram model",
    "gzip_9_bits_per_byte": "gzip -9",
    "xz_9_bits_per_byte": "xz -9",
}
MAX_SAMPLES = 6


class Config(Protocol):
    """What a config must offer to be shown."""

    def to_json(self) -> str:
        """Every field as a JSON object."""

    def differences(self) -> dict[str, tuple[object, object]]:
        """Fields that differ from the preset, as (the preset's value, own value)."""


def show_corpus(run: Run) -> None:
    """Display what the run is trained on: size, documents, hash, split."""
    corpus_section(run).show()


def show_config(config: Config) -> None:
    """Display every field of the config; what differs from the preset is marked."""
    config_section(json.loads(config.to_json()), config.differences()).show()


def show_plan(forecast: "Forecast", n_runs: int = 1, notes: Sequence[str] = ()) -> None:
    """Display what a run will take before it is started, n_runs times: memory by kind, tokens, time, disk.

    `notes` are sentences to be read first, as about what will not be done.
    """
    plan_section(forecast, n_runs, notes).show()


def show_memory(run: Run) -> None:
    """Display the memory that was predicted before the first step beside the peak that was measured."""
    memory_section(run).show()


def show_curves(run: Run) -> None:
    """Display loss, validation bits per byte, learning rate, gradient norm, speed and memory over the steps."""
    curves_section(run).show()


def show_samples(run: Run) -> None:
    """Display text that the model wrote at several points of the run."""
    samples_section(run).show()


def show_yardsticks(run: Run) -> None:
    """Display the model beside simple models and compressors, on the same validation text."""
    yardsticks_section(run).show()


def show_environment(run: Run) -> None:
    """Display versions, hardware and code of every session that trained the run."""
    environment_section(run).show()


def corpus_section(run: Run) -> Section:
    """See `show_corpus`."""
    manifest = run.manifest()
    if not manifest:
        return empty_section("corpus", "The corpus has not been prepared.")
    corpus, tokenizer, splits = (
        _mapping(manifest["corpus"]),
        _mapping(manifest["tokenizer"]),
        _mapping(manifest["splits"]),
    )
    names = ", ".join(str(name) for name in _sequence(corpus["names"]))
    said = f"{names}: {corpus['n_documents']:,} documents, {format_bytes(corpus['n_bytes'])}"
    head = facts(
        {
            "corpus": said,
            "SHA-256 of the text": corpus["sha256"],
            "tokenizer": f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} entries",
            "SHA-256 of the tokenizer": tokenizer["sha256"],
        }
    )
    rows = [
        (name, split["n_documents"], format_bytes(split["n_bytes"]), split["n_tokens"], f"{str(split['sha256'])[:16]}…")
        for name, split in ((name, _mapping(split)) for name, split in splits.items())
    ]
    return Section("corpus", head + table(("split", "documents", "size", "tokens", "SHA-256"), rows), said)


def config_section(config: Mapping[str, object], differences: Mapping[str, tuple[object, object]]) -> Section:
    """See `show_config`."""
    rows = [
        (name, json.dumps(value, ensure_ascii=False), json.dumps(differences[name][0]) if name in differences else "")
        for name, value in sorted(config.items(), key=lambda item: item[0] not in differences)
    ]
    changed = frozenset(range(len(differences)))
    said = f"{len(differences)} of {len(config)} fields differ from the preset"
    header = ("field", "value", "preset, where it differs")
    caption = f"{said}; these stand first." if differences else f"{said}."
    n_columns = 3 if differences else 2
    body = table(header[:n_columns], [row[:n_columns] for row in rows], caption, changed)
    return Section(
        "config", body, said + ": " + ", ".join(f"{name}={value}" for name, (_, value) in differences.items())
    )


def plan_section(forecast: "Forecast", n_runs: int = 1, notes: Sequence[str] = ()) -> Section:
    """See `show_plan`."""
    plan = forecast.memory
    fit = f"{plan.prediction.total / MIB:,.0f} of {plan.limit_bytes / MIB:,.0f} MiB ({plan.limit_source})"
    cut = (
        f"{plan.n_micro_batches} x {plan.micro_batch_size} rows, "
        f"activation checkpointing {plan.activation_checkpointing}"
        f"{', optimizer on the host' if plan.optimizer_offload else ''}"
    )
    tokens = f"{forecast.n_tokens:,} in {forecast.n_steps:,} steps of {forecast.tokens_per_step:,}"
    time = format_duration(forecast.seconds)
    if n_runs > 1:
        time = f"{format_duration(n_runs * forecast.seconds)} for at most {n_runs} runs of {time}"
    disk = f"{format_bytes(forecast.disk_bytes)}, up to {forecast.n_checkpoints} checkpoints kept"
    head = facts(
        {
            "parameters": forecast.n_parameters,
            "peak memory, predicted": fit,
            "micro-batches": cut,
            "tokens": tokens,
            "time, an estimate": f"{time}: {forecast.share_of_rate:.0%} of the {forecast.flops_per_s / 1e9:,.0f} "
            f"GFLOP/s that a matrix product reached here just now, and {1000 * forecast.overhead_s_per_step:.0f} ms a "
            "step to call everything; evaluation, checkpoints and compilation come on top",
            "disk": disk,
        }
    )
    said = f"predicted peak {fit}; {cut}; {tokens} tokens; about {time}; disk {disk}"
    told = "".join(f"<p><strong>{escape(note)}.</strong></p>" for note in notes)
    return Section("plan", told + head + _memory_table(plan), "\n".join([*notes, said]))


def memory_section(run: Run) -> Section:
    """See `show_memory`."""
    stored = run.memory_plan()
    if stored is None:
        return empty_section("memory", "No memory has been planned.")
    predicted = stored.prediction.total / MIB
    measured = max((_float(record["peak_mem_mib"]) for record in run.metrics() if "peak_mem_mib" in record), default=0)
    values: dict[str, object] = {"peak memory, predicted": f"{predicted:,.0f} MiB"}
    said = f"Predicted peak {predicted:,.0f} MiB"
    if measured:
        values["peak memory, measured"] = f"{measured:,.0f} MiB"
        values["predicted over measured"] = f"{predicted / measured:.2f}"
        said += f", measured {measured:,.0f} MiB: {predicted / measured:.2f} of it"
    values["allowed"] = f"{stored.limit_bytes / MIB:,.0f} MiB ({stored.limit_source})"
    return Section("memory", facts(values) + _memory_table(stored), f"{said}.")


def _memory_table(plan: MemoryPlan) -> str:
    rows = [(kind, f"{n_bytes / MIB:,.0f} MiB") for kind, n_bytes in plan.prediction.by_kind().items() if n_bytes]
    by_kind = table(("at the predicted peak", "size"), rows)
    tried = [
        (
            f"{rung.micro_batch_size} rows, checkpointing {rung.activation_checkpointing}"
            f"{', optimizer on the host' if rung.optimizer_offload else ''}",
            f"{total / MIB:,.0f} MiB",
        )
        for rung, total in plan.tried
    ]
    return by_kind + (table(("looked at", "predicted peak"), tried) if len(tried) > 1 else "")


def curves_section(run: Run) -> Section:
    """See `show_curves`."""
    from hydra.notebook.charts import Line, line_chart

    records = run.metrics()
    train = [record for record in records if "loss_nats" in record]
    val = [record for record in records if "val_loss_nats" in record]
    if not train and not val:
        return empty_section("curves", "No step has been logged.")

    def line(key: str, rows: Sequence[Mapping[str, object]], label: str = "") -> Line:
        present = [row for row in rows if row.get(key) is not None]
        return Line(
            label, [_float(r["step"]) for r in present], [_float(r[key]) for r in present], is_sparse=rows is val
        )

    pictures, sentences = [], []
    charts: list[tuple[str, str, list[Line], bool]] = [
        (
            "loss",
            "nats per token",
            [line("loss_nats", train, "training"), line("val_loss_nats", val, "validation")],
            False,
        ),
        ("validation bits per byte", "bits per byte", [line("val_bits_per_byte", val)], False),
        ("learning rate", "learning rate", [line("learning_rate", train)], True),
        ("gradient norm before clipping", "L2 norm", [line("grad_norm", train)], True),
        ("speed", "tokens per second", [line("tokens_per_s", train)], True),
        ("peak memory", "MiB", [line("peak_mem_mib", train)], True),
    ]
    for title, unit, lines, starts_at_zero in charts:
        drawn = [one for one in lines if one.x]
        if not drawn:
            continue
        sentence = " ".join(_describe_line(f"{one.label} {title}".strip(), one.x, one.y, unit) for one in drawn)
        rows = [(int(x), one.label or title, y) for one in drawn for x, y in zip(one.x, one.y, strict=True)]
        picture = line_chart(drawn, unit, starts_at_zero=starts_at_zero)
        pictures.append(figure(picture, sentence, title.capitalize(), ("step", "line", unit), sorted(rows)))
        sentences.append(sentence)
    return Section("curves", f'<div class="figures">{"".join(pictures)}</div>', "\n".join(sentences))


def loss_section(run: Run) -> Section:
    """The loss alone, as `watch` leaves it behind."""
    from hydra.notebook.charts import Line, line_chart

    train = [record for record in run.metrics() if "loss_nats" in record]
    if not train:
        return empty_section("loss", "No step has been logged.")
    x, y = [_float(record["step"]) for record in train], [_float(record["loss_nats"]) for record in train]
    sentence = _describe_line("training loss", x, y, "nats per token")
    picture = line_chart([Line("training loss", x, y)], "nats per token")
    rows = list(zip((int(step) for step in x), y, strict=True))
    return Section("loss", figure(picture, sentence, "Training loss", ("step", "nats per token"), rows), sentence)


def samples_section(run: Run) -> Section:
    """See `show_samples`."""
    samples = run.samples()
    if not samples:
        return empty_section("samples", "No text sample has been written.")
    shown = samples
    if len(samples) > MAX_SAMPLES:
        shown = [samples[round(index * (len(samples) - 1) / (MAX_SAMPLES - 1))] for index in range(MAX_SAMPLES)]
    body = "".join(
        f"<h4>Step {escape(format_number(sample['step']))}</h4>"
        f"<pre><b>{escape(sample['prompt'])}</b>{escape(sample['text'])}</pre>"
        for sample in shown
    )
    return Section("samples", body, "\n\n".join(f"step {s['step']}: {s['prompt']}{s['text']}" for s in shown))


def yardsticks_section(run: Run) -> Section:
    """See `show_yardsticks`."""
    from hydra.notebook.charts import bar_chart

    known = _mapping(run.manifest().get("yardsticks", {}))
    rows = [(title, _float(known[key])) for key, title in YARDSTICKS.items() if key in known]
    for record in [record for record in run.metrics() if "val_bits_per_byte" in record][-1:]:
        rows.append((f"this run, step {record['step']}", _float(record["val_bits_per_byte"])))
    if not rows:
        return empty_section("yardsticks", "Nothing has been measured on the validation text.")
    rows.sort(key=lambda row: -row[1])
    highlighted = next((index for index, row in enumerate(rows) if row[0].startswith("this run")), -1)
    sentence = (
        "Bits per byte of the validation text, lower is better: " + ", ".join(f"{n} {v:.3f}" for n, v in rows) + "."
    )
    picture = bar_chart([name for name, _ in rows], [value for _, value in rows], "bits per byte", highlighted)
    body = figure(picture, sentence, "Bits per byte, lower is better", ("model", "bits per byte"), rows)
    return Section("yardsticks", body, sentence)


def environment_section(run: Run) -> Section:
    """See `show_environment`."""
    environment = run.environment()
    sessions = [_mapping(session) for session in _sequence(environment.get("sessions", []))]
    if not sessions:
        return empty_section("environment", "No trainer has begun.")
    body = ""
    for number, session in enumerate(sessions, start=1):
        values = {name.replace("_", " "): _shown(value) for name, value in session.items() if name != "packages"}
        started_at = datetime.fromtimestamp(_float(session["started_at"]), UTC)
        values["started at"] = f"{started_at:%Y-%m-%d %H:%M:%S} UTC"
        packages = ", ".join(f"{name} {version}" for name, version in _mapping(session.get("packages", {})).items())
        title = f"<h4>Session {number} of {len(sessions)}</h4>" if len(sessions) > 1 else ""
        body += title + facts({**values, **({"packages": packages} if packages else {})})
    if changes := list_changes(run):
        body += table(("on the way, from step", "field", "before", "then"), changes)
    resolved = _mapping(environment.get("resolved", {}))
    if resolved:
        body += table(
            ("chosen at the first start", "value"), [(name, _shown(value)) for name, value in resolved.items()]
        )
    return Section("environment", body, json.dumps(environment, indent=1))


def list_changes(run: Run) -> list[tuple[int, str, str, str]]:
    """In what the run's config changed on the way: finished steps at that time, field, value before and then."""
    return [
        (int(_float(change["step"])), name, _shown(before), _shown(then))
        for change in map(_mapping, _sequence(run.environment().get("changes", [])))
        for name, (before, then) in ((name, _sequence(both)) for name, both in _mapping(change["fields"]).items())
    ]


REPORT_SECTIONS: Sequence[tuple[str, Callable[[Run], Section]]] = (
    ("Corpus", corpus_section),
    ("Curves", curves_section),
    ("Memory", memory_section),
    ("Samples", samples_section),
    ("Yardsticks", yardsticks_section),
    ("Environment", environment_section),
)


def _describe_line(name: str, x: Sequence[float], y: Sequence[float], unit: str) -> str:
    return (
        f"{name.capitalize()} goes from {format_number(y[0])} at step {x[0]:,.0f} to {format_number(y[-1])} at step "
        f"{x[-1]:,.0f} ({unit}; lowest {format_number(min(y))}, highest {format_number(max(y))})."
    )


def _shown(value: object) -> str:
    words = {"None": "none", "True": "yes", "False": "no"}
    if value is None or isinstance(value, bool):
        return words[str(value)]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _mapping(value: object) -> Mapping[str, object]:
    assert isinstance(value, Mapping), value
    return value


def _sequence(value: object) -> Sequence[object]:
    assert isinstance(value, Sequence), value
    return value


def _float(value: object) -> float:
    assert isinstance(value, int | float), value
    return float(value)
