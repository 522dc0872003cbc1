"""The sections of a comparison and its report. Each reads the folder of the comparison only."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.notebook.figures import environment_section
from hydra.notebook.markup import Section, empty_section, escape, figure, format_bytes, format_number, table
from hydra.notebook.progress import format_duration
from hydra.runtime import Run, RunStatus, paths

TITLES = {"parameters": "parameters", "flops": "FLOPs", "kv_bytes": "KV bytes"}
COSTS: Sequence[tuple[str, str, float]] = (
    ("training_tokens_per_s", "training, tokens/s", 1.0),
    ("prefill_tokens_per_s", "prefill, tokens/s", 1.0),
    ("decode_ms_per_token", "decode, ms/token", 1.0),
    ("peak_memory_bytes", "peak memory of a training step, MiB (predicted)", 1 / 2**20),
)
"""Keys of a measured cost, what they are called, and what they are multiplied by to be shown."""
NAME_WIDTH = 26


def show_verdicts(run: Run) -> None:
    """Display each arm against the baseline: difference, interval, verdict, and what would decide the rest."""
    verdicts_section(run).show()


def show_arms(run: Run) -> None:
    """Display what every arm has: widths solved for, parameters, FLOPs, cache; and which were left out, and why."""
    arms_section(run).show()


def show_learning_rates(run: Run) -> None:
    """Display the learning rates that were tried for every arm, and the one chosen."""
    learning_rates_section(run).show()


def show_costs(run: Run) -> None:
    """Display speed, memory and cache of every arm by the length of a row."""
    costs_section(run).show()


def answer(run: Run, status: RunStatus) -> list[str]:
    """The answer, a sentence for each comparison, and one for each arm that was left out of it."""
    if not _comparisons(run):
        return ["There is no answer yet: no arm has been compared.", *answer_lines(run)]
    unfinished = [] if status.status == "done" else ["Not all comparisons are done."]
    return [*unfinished, *answer_lines(run)]


def answer_lines(run: Run) -> list[str]:
    """One line for each comparison, then one for each arm that was left out."""
    verdicts = [_summarise(equal, found) for equal, found in _comparisons(run).items()]
    left_out = [
        f"Left out at equal {TITLES[equal]}{'' if len(found['arms']) > 1 else ', with no arm left'}: "
        f"{one['name']}, because {one['reason']}."
        for equal, found in _all_comparisons(run).items()
        for one in found["left_out"]
    ]
    return verdicts + left_out


def cost(status: RunStatus) -> Mapping[str, object]:
    """What the comparison took."""
    return {
        "status": f"{status.status}, run {status.step:,} of {status.max_steps:,}",
        "restarts": status.restarts,
        "wall time": format_duration(status.train_s),
        "tokens": status.tokens,
    }


def verdicts_section(run: Run) -> Section:
    """See `show_verdicts`."""
    from hydra.notebook.charts import interval_chart

    comparisons = _comparisons(run)
    if not comparisons:
        return empty_section("verdicts", "No arm has been compared yet.")
    bodies, texts = [], []
    for equal, found in comparisons.items():
        comparison = found["comparison"]
        bodies.append(f"<h4>At equal {TITLES[equal]}</h4>")
        baseline = comparison["baseline"]
        figures = list(found["figures"][baseline].values())
        mean = sum(figures) / len(figures)
        head = f"Baseline {baseline}: {mean:.4f} {comparison['unit']}, mean of {len(figures)} seeds."
        rows, names, values, intervals = [], [], [], []
        for arm in comparison["arms"]:
            interval = arm["simultaneous_interval"]
            shown = "–" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
            detectable = arm["detectable_effect"]
            rows.append(
                (
                    arm["name"],
                    f"{arm['mean_difference']:+.4f}",
                    shown,
                    arm["verdict"],
                    "–" if detectable is None else f"{detectable:.4f}",
                    arm["seeds_to_decide"],
                    _hours(arm["hours_to_decide"]),
                )
            )
            names.append(_shorten(arm["name"]))
            values.append(arm["mean_difference"])
            intervals.append(None if interval is None else tuple(interval))
        caption = f"Difference to the baseline in {comparison['unit']} at equal {TITLES[equal]}; less is better"
        sentences = [arm["sentence"] for arm in comparison["arms"]]
        header = (
            "arm",
            "difference",
            f"{100 * comparison['confidence']:g} % interval",
            "verdict",
            "would find",
            "seeds",
            "hours",
        )
        picture = interval_chart(names, values, intervals, comparison["unit"])
        bodies.append(f"<p>{escape(head)}</p>")
        bodies.append(figure(picture, " ".join(sentences), caption, header, rows))
        bodies.append("<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>")
        texts += [f"At equal {TITLES[equal]}. {head}", *sentences]
    return Section("verdicts", "".join(bodies), "\n".join(texts))


def arms_section(run: Run) -> Section:
    """See `show_arms`."""
    comparisons = _all_comparisons(run)
    if not comparisons:
        return empty_section("arms", "No widths have been solved for yet.")
    header = ("arm", "as trained", "feed-forward width", "parameters", "forward FLOPs", "cache of a row")
    bodies, texts = [], []
    for equal, found in comparisons.items():
        rows = [
            (
                arm["name"],
                "the same" if arm["attention"] == arm["name"] else arm["attention"],
                arm["d_feed_forward"],
                arm["n_parameters"],
                f"{arm['forward_flops']:.4g}",
                format_bytes(arm["cache_bytes"]),
            )
            for arm in found["arms"]
        ]
        bodies.append(table(header, rows, f"At equal {TITLES[equal]}, one row of context_length tokens"))
        for one in found["left_out"]:
            bodies.append(f"<p>Left out: {escape(one['name'])}, because {escape(one['reason'])}.</p>")
            texts.append(f"left out at equal {TITLES[equal]}: {one['name']}, because {one['reason']}")
        texts += [f"equal {TITLES[equal]}: {row[0]}: {', '.join(map(format_number, row[1:]))}" for row in rows]
    return Section("arms", "".join(bodies), "\n".join(texts))


def learning_rates_section(run: Run) -> Section:
    """See `show_learning_rates`."""
    chosen = {
        equal: found["learning_rates"] for equal, found in _all_comparisons(run).items() if "learning_rates" in found
    }
    if not chosen:
        return empty_section("learning-rates", "No learning rate has been chosen yet.")
    bodies, texts = [], []
    for equal, arms in chosen.items():
        tried = list(next(iter(arms.values()))["tried"])
        rows = [
            (
                name,
                f"{arm['chosen']:g}",
                *("diverged" if value is None else f"{value:.4f}" for value in arm["tried"].values()),
            )
            for name, arm in arms.items()
        ]
        caption = f"At equal {TITLES[equal]}: bits per byte of one seed that is not compared, by learning rate"
        bodies.append(table(("arm", "chosen", *tried), rows, caption))
        warnings = [arm["warning"] for arm in arms.values() if arm["warning"]]
        bodies += [f"<p><strong>{escape(warning)}</strong></p>" for warning in warnings]
        texts += [f"equal {TITLES[equal]}: {row[0]}: {row[1]}" for row in rows] + warnings
    return Section("learning-rates", "".join(bodies), "\n".join(texts))


def costs_section(run: Run) -> Section:
    """See `show_costs`."""
    costs = paths.read_json(run.directory / paths.RESULTS).get("costs", {})
    if not costs:
        return empty_section("costs", "Nothing has been measured yet.")
    lengths = list(costs)
    names = list(costs[lengths[0]])
    bodies, texts = [], []
    for key, title, factor in COSTS:
        rows = [(name, *(round(factor * costs[length][name][key], 3) for length in lengths)) for name in names]
        bodies.append(table(("arm", *(f"{int(length):,} tokens" for length in lengths)), rows, title))
        texts += [f"{title}: {row[0]}: {', '.join(map(format_number, row[1:]))}" for row in rows]
    rows = []
    for name in names:
        measured = [costs[length][name]["cache_bytes"] for length in lengths]
        by_formula = [costs[length][name]["cache_bytes_by_formula"] for length in lengths]
        rows.append((name, *map(format_bytes, measured), "yes" if measured == by_formula else "NO"))
    header = ("arm", *(f"{int(length):,} tokens" for length in lengths), "as the formula says")
    bodies.append(table(header, rows, "cache of one row, measured from its tensors"))
    texts += [f"cache: {', '.join(row)}" for row in rows]
    return Section("costs", "".join(bodies), "\n".join(texts))


SECTIONS: Sequence[tuple[str, Callable[[Run], Section]]] = (
    ("Verdicts", verdicts_section),
    ("Arms", arms_section),
    ("Learning rates", learning_rates_section),
    ("Speed, memory, cache", costs_section),
    ("Environment", environment_section),
)


def _comparisons(run: Run) -> Mapping[str, Any]:
    """The finished ones, by what was made equal."""
    return {equal: found for equal, found in _all_comparisons(run).items() if found.get("comparison")}


def _all_comparisons(run: Run) -> Mapping[str, Any]:
    """Those that have been begun, too: what is known before the first run is which arms were left out."""
    comparisons: Mapping[str, Any] = paths.read_json(run.directory / paths.RESULTS).get("comparisons", {})
    return comparisons


def _summarise(equal: str, found: Mapping[str, Any]) -> str:
    comparison = found["comparison"]
    by_verdict: dict[str, list[str]] = {}
    for arm in comparison["arms"]:
        by_verdict.setdefault(arm["verdict"], []).append(f"{arm['name']} ({arm['mean_difference']:+.3f})")
    verdicts = "; ".join(
        f"{verdict}: {', '.join(by_verdict[verdict])}"
        for verdict in ("better", "worse", "undecided")
        if verdict in by_verdict
    )
    return f"At equal {TITLES[equal]}, against {comparison['baseline']}, {comparison['unit']}: {verdicts}."


def _hours(hours: float | None) -> str:
    return "–" if hours is None else f"{hours:.2g}"


def _shorten(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 1]}…"
