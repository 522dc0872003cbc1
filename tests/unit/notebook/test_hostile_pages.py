"""Whatever stands in a run or a notebook, its report is a page that runs nothing and fetches nothing."""

import base64
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from hydra.notebook.plan import COMPARISON, TRAINING, Plan
from hydra.notebook.report import render_report
from hydra.notebook.sanitise import clean_html
from hydra.runtime import Run, RunStatus
from hydra.testing.hostile.pages import (
    VECTORS,
    Page,
    count_marks,
    forms_of,
    mark_of,
    read_page,
    render_with_vectors,
)


def check(path: Path) -> Page:
    page = read_page(path)
    assert page.wrong == []
    return page


def outputs_of(vector: str, number: int) -> list[nbformat.NotebookNode]:
    outputs = [new_output("display_data", data, metadata=metadata) for data, metadata in forms_of(vector)]
    outputs.append(new_output("stream", name="stderr", text=vector))
    outputs.append(new_output("error", ename=vector, evalue=vector, traceback=[vector, f"\x1b[31m{vector}\x1b[0m"]))
    outputs.append(new_output("stream", text=mark_of(number)))
    return outputs


def test_every_vector_in_every_place_of_a_notebook(
    make_run: Callable[..., Run], done_status: RunStatus, plan: Plan
) -> None:
    make_run(done_status)
    cells = [new_markdown_cell(f"# {VECTORS[0]} {VECTORS[4]}\n")]
    for number, vector in enumerate(VECTORS):
        cells += [new_markdown_cell(f"## {vector}\n\n{vector}\n"), new_code_cell(f"# {vector}")]
        cells[-1].outputs = outputs_of(vector, number)
    page = check(render_report(new_notebook(cells=cells), plan, failure=" ".join(VECTORS)))
    assert count_marks(page) == len(VECTORS)
    assert "How to reproduce it" in page.text


@pytest.mark.parametrize("job", [TRAINING, COMPARISON])
def test_every_vector_in_every_place_of_a_run(make_run: Callable[..., Run], done_status: RunStatus, job: str) -> None:
    directory = make_run(done_status).directory
    directory = directory.rename(directory.with_name(VECTORS[4]))
    page = check(render_with_vectors(directory, job))
    assert count_marks(page) == len(VECTORS)
    assert page.text.count(VECTORS[0]) > 10


@pytest.mark.parametrize("vector", VECTORS)
def test_cleaning_is_enough_by_itself(vector: str) -> None:
    """In case that a browser opens the page without its policy; and once cleaned, cleaning again changes nothing."""
    cleaned = clean_html(vector)
    page = Page(f"<body>{cleaned}")
    assert page.wrong == []
    assert clean_html(cleaned) == cleaned


def test_what_notebooks_show_survives() -> None:
    png = base64.b64encode(b"\x89PNG").decode()
    kept = (
        '<div class="x" data-hydra="curves"><h4 id="a">T</h4>'
        '<p style="color: red;">a <b>b</b> <a href="https://e.org/">c</a></p>'
        f'<figure style="margin: 0 0 1.5em;"><img alt="d" src="data:image/png;base64,{png}">'
        "<figcaption>e</figcaption></figure>"
        '<table class="dataframe"><thead><tr><th scope="col">f</th></tr></thead>'
        '<tbody><tr><td colspan="2">1 &lt; 2</td></tr>'
        "</tbody></table><details open><summary>g</summary><pre><code>h</code></pre></details></div>"
    )
    assert clean_html(kept) == kept
