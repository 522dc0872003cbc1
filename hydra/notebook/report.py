"""The report: one HTML file that fetches nothing, needs no JavaScript, and tells the truth about a failed run too.

Its first screen and its end come from the run directory and the plan, so that they are there even when no cell ran;
between them stands the executed notebook. What a run directory holds and no cell has shown is added behind it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bs4 import BeautifulSoup, Tag
from nbconvert import HTMLExporter
from nbformat import NotebookNode, from_dict
from nbformat.v4 import new_output
from traitlets.config import Config

from hydra.notebook import comparison
from hydra.notebook.endings import raising_not_saved
from hydra.notebook.figures import REPORT_SECTIONS, YARDSTICKS, config_section, list_changes
from hydra.notebook.markup import Section, escape, format_number, tiles
from hydra.notebook.plan import COMPARISON, TRAINING, Plan
from hydra.notebook.progress import format_duration
from hydra.notebook.sanitise import clean_html
from hydra.runtime import Run, RunStatus
from hydra.runtime.paths import write_atomically
from hydra.runtime.secrets import mask, mask_texts
from hydra.runtime.sums import update_sums

REPORT = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
MAX_OUTPUTS_BYTES = 1_400_000
MAX_TEXT_CHARACTERS = 20_000
LOG_LINES = 25
PRIORITY = ("text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain")


def render_report(nb: NotebookNode, plan: Plan, failure: str | None) -> Path:
    """Write report.html into the run directory, whole or not at all; returns its path.

    Args:
        nb: the notebook, executed as far as it came; it is not changed.
        failure: why the notebook did not end well, None when it did.

    Raises:
        NotSavedError: it cannot be written.
    """
    run = Run(plan.run_dir)
    shown = from_dict(mask_texts(nb))
    shown.metadata.pop("widgets", None)
    title = _take_title(shown) or run.name
    if failure is not None:
        # A heading over cells that never ran would promise what is not there; the sections come from the run directory.
        shown.cells = [cell for cell in shown.cells if cell.metadata.get("papermill", {}).get("status") != "pending"]
    _bound_outputs(shown)
    page = _exporter().from_notebook_node(
        shown,
        resources={
            "hydra": {
                "title": title,
                "summary": "".join(_summary(run, plan, failure)),
                "appendix": "".join(_appendix(run, plan, shown)),
            }
        },
    )[0]
    page = _seal(page)
    path = plan.run_dir / REPORT
    with raising_not_saved(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
        update_sums(path)
    return path


def answer_line(run: Run) -> list[str]:
    """The validation figure beside its yardsticks, in one line; [] when nothing was measured."""
    status = run.status()
    if status.val_bits_per_byte is None or status.val_loss_nats is None:
        return []
    yardsticks = "".join(f" | {name} {value:.3f}" for name, value in _yardsticks(run))
    measured = f"{status.val_bits_per_byte:.3f} bits per byte ({status.val_loss_nats:.3f} nats per token)"
    return [f"validation: {measured}{yardsticks}"]


def _summary(run: Run, plan: Plan, failure: str | None) -> list[str]:
    """The first screen: what failed, if anything did; what was asked, the answer, the status, the cost."""
    status = run.status()
    parts = []
    if failure is not None or status.status in ("failed", "interrupted"):
        happened = [failure] if failure is not None else []
        if status.status in ("failed", "interrupted"):
            cause = ": ".join(part for part in (status.cause, status.message) if part)
            verb = "failed" if status.status == "failed" else "was cut off"
            where = f"{status.unit} {status.step} of {status.max_steps}"
            happened.append(f"The run {verb} at {where} ({cause}).")
        told = "".join(f"<p>{escape(_strip_colour(line))}</p>" for line in happened)
        heading = "It did not end well"
        if status.status == "interrupted":
            heading = "It was cut off, and can go on"
            told += f"<p>The same command goes on:</p><pre>{escape(plan.command)}</pre>"
        log = run.log_tail(LOG_LINES)
        tail = (
            f"<details open><summary>Last lines of trainer.log</summary><pre>{escape(log)}</pre></details>"
            if log
            else ""
        )
        parts.append(f'<section class="failure" role="alert"><h2 id="failure">{heading}</h2>{told}{tail}</section>')
    job = JOBS[plan.job]
    parts.append(f'<p class="question">{escape(plan.question)}</p>')
    parts += [f'<p class="answer">{escape(line)}</p>' for line in job.answer(run, status)]
    parts.append(f"<h2 id='status-and-cost'>Status and cost</h2>{tiles(job.cost(status))}")
    return parts


def _answer(run: Run, status: RunStatus) -> str:
    """The answer in one sentence, with its figure and its yardsticks."""
    measured = [record for record in run.metrics() if "val_bits_per_byte" in record]
    if not measured:
        return "There is no answer yet: nothing was measured on the validation text."
    value, step = float(str(measured[-1]["val_bits_per_byte"])), int(str(measured[-1]["step"]))
    said = f"{value:.3f} bits per byte on validation text that the model never trained on"
    if status.status != "done":
        said = f"No final answer; at step {step} of {status.max_steps}: {said}"
    compared = [
        f"{abs(value / other - 1):.0%} {'below' if value < other else 'above'} "
        f"{'the ' if name.endswith('model') else ''}{name} ({other:.3f})"
        for name, other in _yardsticks(run)
    ]
    return f"{said}, {', '.join(compared)}." if compared else f"{said}."


def _cost(status: RunStatus) -> Mapping[str, object]:
    return {
        "status": f"{status.status}, step {status.step:,} of {status.max_steps:,}",
        "restarts": status.restarts,
        **({"skipped steps": status.skipped_steps} if status.skipped_steps else {}),
        "wall time": format_duration(status.train_s),
        "tokens": status.tokens,
        "training FLOPs": f"{status.train_flops:.3g}",
        "parameters": status.n_parameters,
    }


def _appendix(run: Run, plan: Plan, nb: NotebookNode) -> list[str]:
    """What the run directory and the plan hold and no cell has shown, and the command."""
    seen = "".join(
        str(out.get("data", {}).get("text/html", "")) for cell in nb.cells for out in cell.get("outputs", [])
    )
    missing = [("Config", config_section(plan.config, plan.differences))] if plan.config else []
    if run.manifest() or run.metrics() or run.environment():
        missing += [(title, build(run)) for title, build in JOBS[plan.job].sections]
    parts = [
        f'<section><h2 id="{section.name}">{escape(title)}</h2>{section.to_html()}</section>'
        for title, section in missing
        if section.marker not in seen
    ]
    changes = [
        f"{field} from {before} to {then} after step {step}"
        for step, field, before, then in list_changes(run)
        if field != "allow_changes"
    ]
    warning = f"<p>It went on with {escape('; '.join(changes))}: from the start on this is another run.</p>"
    parts.append(
        '<section><h2 id="reproduce">How to reproduce it</h2>'
        "<p>In a checkout of the commit that stands under Environment:</p>"
        f"<pre>{escape(plan.command)}</pre>{warning if changes else ''}</section>"
    )
    return parts


def _yardsticks(run: Run) -> Sequence[tuple[str, float]]:
    """The yardsticks that a model should beat, as (name, bits per byte)."""
    known = run.manifest().get("yardsticks", {})
    assert isinstance(known, Mapping)
    return [
        (YARDSTICKS[key], float(known[key])) for key in YARDSTICKS if key in known and not key.startswith("unigram")
    ]


@dataclass(frozen=True)
class Job:
    """How the report of one kind of notebook tells what came of it."""

    answer: Callable[[Run, RunStatus], list[str]]
    """Each sentence stands in a line of its own."""
    cost: Callable[[RunStatus], Mapping[str, object]]
    sections: Sequence[tuple[str, Callable[[Run], Section]]]
    lines: Callable[[Run], list[str]]


JOBS = {
    TRAINING: Job(lambda run, status: [_answer(run, status)], _cost, REPORT_SECTIONS, answer_line),
    COMPARISON: Job(comparison.answer, comparison.cost, comparison.SECTIONS, comparison.answer_lines),
}


def _exporter() -> HTMLExporter:
    config = Config()
    config.TemplateExporter.extra_template_basedirs = [str(TEMPLATES)]
    config.NbConvertBase.display_data_priority = list(PRIORITY)
    exporter = HTMLExporter(config=config, template_name="report", embed_images=True)
    exporter.register_filter("clean_html", clean_html)
    return exporter


def _take_title(nb: NotebookNode) -> str | None:
    """The notebook's first heading of level 1, taken out: the page has one such heading, and it stands on top."""
    for cell in nb.cells:
        found = re.search(r"^# (.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if found:
            cell.source = cell.source[: found.start()] + cell.source[found.end() :]
            return found[1].strip()
    return None


def _bound_outputs(nb: NotebookNode) -> None:
    """Shorten long texts, then drop the largest outputs until the page stays under its size. Each says so."""
    outputs = [out for cell in nb.cells for out in cell.get("outputs", [])]
    for out in outputs:
        if out.output_type == "stream" and len(out.text) > MAX_TEXT_CHARACTERS:
            half = MAX_TEXT_CHARACTERS // 2
            out.text = f"{out.text[:half]}\n[… shortened for the report; the notebook has more …]\n{out.text[-half:]}"
    total = sum(_size(out) for out in outputs)
    for out in sorted(outputs, key=_size, reverse=True):
        if total <= MAX_OUTPUTS_BYTES:
            return
        total -= _size(out)
        note = f"[an output of {format_number(_size(out))} bytes is left out of the report; the notebook has it]\n"
        out.clear()
        out.update(new_output("stream", name="stdout", text=note))


def _size(out: NotebookNode) -> int:
    """Bytes that the output takes on the page, about: of several forms of it only one is shown."""
    if "data" in out:
        shown = next((kind for kind in PRIORITY if kind in out.data), None)
        return len(str(out.data[shown]).encode()) if shown else 0
    return len(str(out.get("text", out.get("traceback", ""))).encode())


def _seal(page: str) -> str:
    """Give the page its contents list and every picture a text; mask the secrets that are left; clean it once more.

    What a notebook displays was cleaned by itself, so that no open tag swallows what stands behind it. The whole page
    comes last, in case that something else slips through the template.
    """
    soup = BeautifulSoup(page, "html.parser")
    body = soup.body
    assert body is not None
    for image in body.find_all("img"):
        if not image.get("src"):
            image.replace_with(f"[picture left out: {image.get('alt') or 'it is not part of this file'}]")
        elif not str(image.get("alt") or "").strip() or "No description has been provided" in str(image["alt"]):
            image["alt"] = "A figure of the notebook; its author gave no description."
    _fill_contents(soup)
    for text in soup.find_all(string=True):
        masked = mask(text)
        if masked != text:
            text.replace_with(masked)
    for tag in body.find_all(True):
        tag.attrs |= {name: mask(str(tag[name])) for name in ("alt", "href", "title") if name in tag.attrs}
    inside = body.decode_contents()
    body.clear()
    before, after = str(soup).split("<body></body>")
    return f"{before}<body>\n{clean_html(inside)}</body>{after}"


def _fill_contents(soup: BeautifulSoup) -> None:
    contents = soup.find("nav")
    assert isinstance(contents, Tag)
    items = soup.new_tag("ol")
    for number, heading in enumerate(soup.find_all("h2")):
        for anchor in heading.find_all("a", class_="anchor-link"):
            anchor.decompose()
        heading["id"] = heading.get("id") or f"section-{number}"
        link = soup.new_tag("a", href=f"#{heading['id']}")
        link.string = heading.get_text().strip()
        item = soup.new_tag("li")
        item.append(link)
        items.append(item)
    contents.append(items)


def _strip_colour(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
