import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from hydra.notebook import comparison
from hydra.notebook.figures import corpus_section, curves_section, samples_section
from hydra.notebook.markup import Section
from hydra.notebook.plan import Plan
from hydra.notebook.report import answer_line, render_report
from hydra.runtime import Run, RunStatus

MAX_BYTES = 2_000_000
HOSTILE = "<script>alert('x')</script><img src=http://example.org/x.png onerror=alert(1)>"
PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
FETCHING = ("src", "srcset", "poster", "background", "data", "action", "formaction", "xlink:href")


def html_output(markup: str) -> nbformat.NotebookNode:
    return new_output("display_data", {"text/html": markup, "text/plain": "plain"})


def notebook(*cells: nbformat.NotebookNode) -> nbformat.NotebookNode:
    return new_notebook(cells=[new_markdown_cell("# A title & more\n\nWords.\n\n## First part"), *cells])


def section_cell(section: Section) -> nbformat.NotebookNode:
    return new_code_cell("show()", outputs=[html_output(section.to_html())])


def assert_is_sealed(page: str) -> BeautifulSoup:
    """Nothing runs, nothing is fetched, every picture has a text, and it is small."""
    soup = BeautifulSoup(page, "html.parser")
    assert len(page.encode()) < MAX_BYTES
    assert soup.find(["script", "iframe", "object", "embed", "link", "base", "form", "video", "audio"]) is None
    for tag in soup.find_all(True):
        for name, value in tag.attrs.items():
            assert not name.startswith("on"), tag
            assert name not in FETCHING or str(value).startswith("data:image/"), tag
            assert not str(value).strip().lower().startswith("javascript:"), tag
            assert name != "style" or "url(" not in str(value), tag
    assert "@import" not in page
    assert "url(" not in "".join(style.get_text() for style in soup.find_all("style"))
    policy = soup.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    for image in soup.find_all("img"):
        assert image["alt"].strip()
        assert "No description has been provided" not in image["alt"]
    return soup


def render(nb: nbformat.NotebookNode, plan: Plan, failure: str | None = None) -> BeautifulSoup:
    return assert_is_sealed(render_report(nb, plan, failure).read_text())


def test_a_finished_run(make_run: Callable[..., Run], done_status: RunStatus, plan: Plan) -> None:
    run = make_run(done_status)
    nb = notebook(
        section_cell(curves_section(run)), section_cell(corpus_section(run)), section_cell(samples_section(run))
    )
    before = nbformat.writes(nb)
    soup = render(nb, plan)
    assert nbformat.writes(nb) == before
    assert soup.html["lang"] == "en"
    assert soup.title.get_text() == "A title & more"
    assert [heading.get_text() for heading in soup.find_all("h1")] == ["A title & more"]
    assert soup.find("meta", attrs={"name": "viewport"}) is not None
    answer = soup.find(class_="answer").get_text()
    assert answer == (
        "1.462 bits per byte on validation text that the model never trained on, 23% below the bigram model (1.890), "
        "17% below gzip -9 (1.770), 1% above xz -9 (1.450)."
    )
    cost = {item.dt.get_text(): item.dd.get_text() for item in soup.find(class_="tiles").find_all("div")}
    assert cost == {
        "status": "done, step 50 of 50",
        "restarts": "2",
        "wall time": "2 min 05 s",
        "tokens": "500",
        "training FLOPs": "1.5e+15",
        "parameters": "4,000,000",
    }
    assert soup.find(class_="failure") is None
    titles = [heading.get_text() for heading in soup.find_all("h2")]
    assert titles == [
        "Status and cost",
        "First part",
        "Config",
        "Memory",
        "Yardsticks",
        "Environment",
        "How to reproduce it",
    ]
    assert [link["href"][1:] for link in soup.nav.find_all("a")] == [heading["id"] for heading in soup.find_all("h2")]
    assert plan.command in [pre.get_text() for pre in soup.find_all("pre")]
    assert soup.find(string=lambda text: "f00d" in text)
    assert answer_line(run) == [
        "validation: 1.462 bits per byte (3.500 nats per token) | bigram model 1.890 | gzip -9 1.770 | xz -9 1.450"
    ]


def test_what_the_run_changed_on_the_way_is_told(
    make_run: Callable[..., Run], done_status: RunStatus, plan: Plan
) -> None:
    run = make_run(done_status)
    path = run.directory / "environment.json"
    fields = {"max_steps": [40, 50], "allow_changes": [[], ["max_steps"]]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "changes": [{"step": 40, "fields": fields}]}))
    soup = render(notebook(), plan)
    rows = [[cell.get_text() for cell in row.find_all(["th", "td"])] for row in soup.find_all("tr")]
    assert ["40", "max_steps", "40", "50"] in rows
    assert "It went on with max_steps from 40 to 50 after step 40: from the start on this is another" in soup.get_text()


def test_every_figure_has_its_data_in_a_table(make_run: Callable[..., Run], done_status: RunStatus, plan: Plan) -> None:
    run = make_run(done_status)
    soup = render(notebook(section_cell(curves_section(run))), plan)
    figures = soup.find_all("figure")
    assert len(figures) == 7
    for figure in figures:
        assert figure.img["src"].startswith("data:image/png;base64,")
        assert any(character.isdigit() for character in figure.img["alt"])
        assert len(figure.details.table.find_all("tr")) > 2
    loss = figures[0]
    assert "Training loss goes from 4.98 at step 1 to 4 at step 50" in loss.img["alt"]
    assert "Validation loss goes from 8 at step 0 to 3.5 at step 50" in loss.img["alt"]
    cells = [[cell.get_text() for cell in row.find_all(["th", "td"])] for row in loss.details.table.find_all("tr")]
    assert cells[0] == ["step", "line", "nats per token"]
    assert cells[1] == ["0", "validation", "8"]
    assert cells[-1] == ["50", "validation", "3.5"]


def test_hostile_texts_stay_texts(make_run: Callable[..., Run], done_status: RunStatus, plan: Plan) -> None:
    run = make_run(replace(done_status, status="failed", cause="error", message=HOSTILE))
    error = new_output("error", ename="E", evalue=HOSTILE, traceback=[f"\x1b[31m{HOSTILE}\x1b[0m"])
    nb = notebook(
        new_code_cell(f"# {HOSTILE}", outputs=[new_output("stream", text=HOSTILE), error]),
        section_cell(samples_section(run)),
    )
    soup = render(nb, replace(plan, command=HOSTILE), failure=f"E: {HOSTILE}")
    shown = soup.get_text()
    # question, failure twice, log, code, stream, traceback, sample, corpus, config (twice, in JSON's spelling), command
    assert shown.count(HOSTILE) == 12


def test_what_a_notebook_displays_cannot_run_or_fetch(
    make_run: Callable[..., Run], done_status: RunStatus, plan: Plan
) -> None:
    make_run(done_status)
    markup = (
        "<p id=kept style='color:red'>kept</p><a href='https://example.org/'>a link</a>"
        "<script src='https://e.org/a.js'></script><script>alert(1)</script><iframe src='//e.org'></iframe>"
        "<img src='https://e.org/a.png'><img src='data:image/png;base64,xx'>"
        "<p onclick='x()' style='background:url(//e.org)'>t</p><a href=' JavaScript:x()'>b</a>"
        "<link rel=stylesheet href='//e.org/a.css'><style>p{background:url(//e.org)}</style>"
        "<svg><image xlink:href='//e.org/b.png'></image></svg><object data='//e.org'></object><base href='//e.org'>"
        "<form action='//e.org'><input formaction='//e.org'></form><meta http-equiv=refresh content='0;url=//e.org'>"
    )
    outputs = [
        html_output(markup),
        new_output("display_data", {"application/javascript": "alert(2)", "text/plain": "no script"}),
        new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure size 640x480>"}),
        new_output("display_data", {"image/png": PIXEL}, metadata={"image/png": {"alt": 'a "described" figure'}}),
        new_output("display_data", {"image/svg+xml": "<svg onload='alert(3)'></svg>"}),
        new_output("display_data", {"text/markdown": "**bold** <script>alert(4)</script> ![x](https://e.org/x.png)"}),
        new_output("display_data", {"application/vnd.plotly.v1+json": {}, "text/html": "<b>static</b>"}),
    ]
    soup = render(
        notebook(new_code_cell("x", outputs=outputs), new_markdown_cell("<script>alert(5)</script>![y](http://e.org)")),
        plan,
    )
    assert soup.find(id="kept")["style"] == "color:red;"
    assert soup.find("a", string="a link")["href"] == "https://example.org/"
    assert 'a "described" figure' in [image["alt"] for image in soup.find_all("img")]
    assert soup.find("b", string="static") is not None
    assert soup.find("strong", string="bold") is not None


@pytest.mark.parametrize("kind", ["stream", "html", "png"])
def test_a_huge_notebook_still_gives_a_small_report(
    make_run: Callable[..., Run], done_status: RunStatus, plan: Plan, kind: str
) -> None:
    make_run(done_status)
    outputs = {
        "stream": [new_output("stream", text="begin" + "x" * 900_000 + "end")] * 5,
        "html": [html_output("<p>" + "y" * 900_000 + "</p>")] * 5,
        "png": [new_output("display_data", {"image/png": "A" * 900_000})] * 5,
    }[kind]
    soup = render(notebook(*[new_code_cell("x", outputs=[output]) for output in outputs]), plan)
    told = "shortened for the report" if kind == "stream" else "left out of the report"
    assert soup.get_text().count(told) in (4, 5)
    assert "Yardsticks" in soup.get_text()


def test_a_failed_run_tells_it_first(make_run: Callable[..., Run], done_status: RunStatus, plan: Plan) -> None:
    make_run(
        replace(done_status, status="failed", step=20, cause="not finite", message="loss must be finite at step 21")
    )
    soup = render(notebook(), plan, failure="RunError: run job is not done")
    assert soup.header.find(["section", "p"])["class"] == ["failure"]
    told = soup.find(class_="failure").get_text()
    assert "RunError: run job is not done" in told
    assert "The run failed at step 20 of 50 (not finite: loss must be finite at step 21)." in told
    assert "first line" in told
    assert soup.find(class_="answer").get_text().startswith("No final answer; at step 50 of 50: 1.462 bits per byte")
    titles = [heading.get_text() for heading in soup.find_all("h2")]
    assert titles[-8:] == [
        "Config",
        "Corpus",
        "Curves",
        "Memory",
        "Samples",
        "Yardsticks",
        "Environment",
        "How to reproduce it",
    ]


def test_a_job_that_ended_before_its_run_began(plan: Plan) -> None:
    soup = render(notebook(), plan, failure="KernelDied: the kernel was killed")
    assert "KernelDied" in soup.find(class_="failure").get_text()
    assert (
        soup.find(class_="answer").get_text() == "There is no answer yet: nothing was measured on the validation text."
    )
    assert soup.find(class_="tiles").dd.get_text() == "queued, step 0 of 0"
    assert plan.command in soup.get_text()


def test_a_report_is_replaced_whole(make_run: Callable[..., Run], done_status: RunStatus, plan: Plan) -> None:
    make_run(done_status)
    path = plan.run_dir / "report.html"
    path.write_text("old")
    kept = Path(plan.run_dir / "hard-link")
    kept.hardlink_to(path)
    assert render_report(notebook(), plan, None) == path
    assert kept.read_text() == "old"
    assert not list(plan.run_dir.glob(".*"))


def test_a_long_log_is_folded_and_its_end_stays(
    make_run: Callable[..., Run], done_status: RunStatus, plan: Plan
) -> None:
    make_run(done_status)
    lines = [f"step {number}/60 {HOSTILE}" for number in range(60)]
    short = "\n".join(lines[:12])
    nb = notebook(
        new_code_cell("watch(run)", outputs=[new_output("stream", text="\n".join(lines) + "\n")]),
        new_code_cell("print(short)", outputs=[new_output("stream", text=short)]),
    )
    soup = render(nb, plan)
    folded = soup.find("details", class_="log")
    assert folded.summary.get_text() == "55 earlier lines"
    assert folded.pre.get_text() == "\n".join(lines[:55])
    assert folded.find_next_sibling("pre").get_text() == "\n".join(lines[55:])
    assert short in [pre.get_text() for pre in soup.find_all("pre")]


def test_a_comparison_tells_each_verdict_and_what_was_left_out_in_a_line(
    make_run: Callable[..., Run], done_status: RunStatus, plan: Plan
) -> None:
    run = make_run(replace(done_status, unit="run"))
    arm = {"name": "mla", "mean_difference": -0.01, "verdict": "better"}
    compared = {"baseline": "gqa", "unit": "bits per byte", "arms": [arm]}
    left_out = [{"name": "lightning", "reason": "no layer of it has one"}]
    results = {
        "comparisons": {
            "parameters": {"arms": [{}, {}], "left_out": [], "comparison": compared},
            "flops": {"arms": [{}, {}], "left_out": [], "comparison": compared},
            "kv_bytes": {"arms": [{}], "left_out": left_out, "comparison": None},
        }
    }
    (run.directory / "results.json").write_text(json.dumps(results))
    told = [
        "At equal parameters, against gqa, bits per byte: better: mla (-0.010).",
        "At equal FLOPs, against gqa, bits per byte: better: mla (-0.010).",
        "Left out at equal KV bytes, with no arm left: lightning, because no layer of it has one.",
    ]
    assert comparison.answer_lines(run) == told
    assert comparison.answer(run, run.status()) == told
    assert comparison.answer(run, replace(run.status(), status="running"))[0] == "Not all comparisons are done."
