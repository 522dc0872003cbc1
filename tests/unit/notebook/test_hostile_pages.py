"""Whatever stands in a run or a notebook, its report is a page that runs nothing and fetches nothing."""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from hydra.notebook.plan import COMPARISON, Plan
from hydra.notebook.report import render_report
from hydra.notebook.sanitise import clean_html
from hydra.runtime import Run, RunStatus

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
VECTORS = [
    "<script>alert(1)</script>",
    "<ScRiPt src=//e.org/x.js></sCrIpT>",
    "<script>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<img src=x onerror=alert(1)>",
    "<img/src='x'/onerror=alert(1)//",
    "<img src=data:image/png;base64,xx onload=alert(1)>",
    "<IMG SRC=javascript:alert(1)>",
    "<img srcset='//e.org/a 1x' src='//e.org/b'>",
    "<svg onload=alert(1)>",
    "<svg><script href=data:,alert(1) />",
    "<svg><style><img src=x onerror=alert(1)></style></svg>",
    "<svg><a xlink:href=javascript:alert(1)><text>x</text></a></svg>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
    "<math href='javascript:alert(1)'>x</math>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<iframe src=javascript:alert(1)>",
    "<object data=javascript:alert(1)>",
    "<embed src=//e.org/x.swf>",
    "<a href=javascript:alert(1)>x</a>",
    "<a href=' &#14; JaVa&#115;cript&colon;alert(1)'>x</a>",
    "<a href='java\tscript:alert(1)'>x</a>",
    "<a href=data:text/html,<script>alert(1)</script>>x</a>",
    "<a href=vbscript:x>x</a>",
    "<form action=//e.org><input formaction=javascript:alert(1) autofocus onfocus=alert(1)><button>x",
    "<body onload=alert(1)>",
    "<base href=//e.org/>",
    "<meta http-equiv=refresh content='0;url=//e.org'>",
    "<meta http-equiv=Content-Security-Policy content='default-src *'>",
    "<link rel=stylesheet href=//e.org/x.css>",
    "<style>@import '//e.org/x.css'; * { background: url(//e.org) } .failure { display: none }</style>",
    "<p style='background:url(//e.org)'>x</p>",
    "<p style='background:u\\72l(//e.org)'>x</p>",
    "<p style='position:fixed;inset:0;color:red'>x</p>",
    "<p style='width:expression(alert(1))'>x</p>",
    "<details open ontoggle=alert(1)>x",
    "<video><source onerror=alert(1)>",
    "<audio src=//e.org/x.wav autoplay>",
    "<marquee onstart=alert(1)>x",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<template><img src=x onerror=alert(1)></template>",
    "<textarea><img title='</textarea><img src=x onerror=alert(1)>'>",
    "<title><img src=x onerror=alert(1)></title>",
    "<xmp><img title='</xmp><img src=x onerror=alert(1)>'>",
    "<plaintext>",
    "<select><option><img src=x onerror=alert(1)>",
    "<!--><img src=x onerror=alert(1)>-->",
    "<!-- <img src=x onerror=alert(1)>",
    "<![CDATA[<img src=x onerror=alert(1)>]]>",
    "<?xml version='1.0'?><img src=x onerror=alert(1)>",
    "</pre></main></body></html><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'\"--></style></script><script>alert(1)</script>",
    "<x onclick=alert(1) style=color:red>x</x>",
    "<p id=failure class=failure role=alert>x",
    "<a href=# target=_blank ping=//e.org>x</a>",
    "\x00<scr\x00ipt>alert(1)</scr\x00ipt>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "[x](javascript:alert(1)) ![y](//e.org/y.png) <javascript:alert(1)>",
    "```html\n<script>alert(1)</script>\n```",
    "{{ resources.__class__ }}{% include '/etc/passwd' %}",
]


class Page(HTMLParser):
    """What a page holds, and what of it must not be there."""

    RUNNING = frozenset(
        ["script", "iframe", "object", "embed", "svg", "math", "form", "input", "base", "template", "frame"]
    )
    FETCHING = frozenset(
        ["src", "srcset", "poster", "background", "data", "action", "formaction", "xlink:href", "ping"]
    )

    def __init__(self, text: str) -> None:
        super().__init__()
        self.wrong: list[object] = []
        self.policies: list[str] = []
        self.text = ""
        self.body = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: "".join(re.split(r"[\s\x00-\x20]", value or "")).lower() for name, value in attributes}
        if tag == "meta" and "http-equiv" in values:
            self.policies.append(dict(attributes)["content"] or "")
            self.wrong += [("policy in the body", attributes)] if self.body else []
        is_head = tag in ("meta", "title", "style", "link") and not self.body
        if tag in self.RUNNING or (tag in ("meta", "title", "style", "link") and not is_head):
            self.wrong.append((tag, attributes))
        for name, value in values.items():
            fetches = name in self.FETCHING or (name == "href" and tag != "a")
            if fetches and not value.startswith("data:image/"):
                self.wrong.append((tag, name, value))
            if name.startswith("on") or (name in ("srcdoc", "target", "http-equiv") and self.body):
                self.wrong.append((tag, name, value))
            if name == "href" and not value.startswith(("#", "http://", "https://", "mailto:")):
                self.wrong.append((tag, name, value))
            if name == "style" and re.search(r"url|@|\\|expression|position|background:", value):
                self.wrong.append((tag, name, value))
            if value.startswith(("javascript:", "vbscript:")):
                self.wrong.append((tag, name, value))
        self.body = self.body or tag == "body"

    def handle_comment(self, data: str) -> None:
        self.wrong.append(("comment", data))

    def handle_data(self, data: str) -> None:
        self.text += data


def check(path: Path) -> Page:
    page = Page(path.read_text())
    assert page.wrong == []
    assert page.policies == [POLICY]
    return page


def outputs_of(vector: str, number: int) -> list[nbformat.NotebookNode]:
    marked = f"{vector}\n\n"
    shown = {"text/html": f"<div>{marked}</div>", "text/markdown": marked, "text/latex": marked, "text/plain": marked}
    outputs = [new_output("display_data", {kind: text}) for kind, text in shown.items()]
    outputs += [
        new_output("display_data", {kind: vector, "text/plain": vector}) for kind in ("image/png", "image/jpeg")
    ]
    outputs.append(new_output("display_data", {"image/svg+xml": vector}, metadata={"image/svg+xml": {"alt": vector}}))
    outputs.append(new_output("display_data", {"image/png": "xx"}, metadata={"image/png": {"alt": vector}}))
    outputs.append(new_output("display_data", {"application/javascript": vector, vector: vector, "text/plain": vector}))
    outputs.append(new_output("stream", name="stderr", text=vector))
    outputs.append(new_output("error", ename=vector, evalue=vector, traceback=[vector, f"\x1b[31m{vector}\x1b[0m"]))
    outputs.append(new_output("stream", text=f"still-here-{number}"))
    return outputs


def test_every_vector_in_every_place_of_a_notebook(
    make_run: Callable[..., Run], done_status: RunStatus, plan: Plan
) -> None:
    make_run(done_status)
    cells = [new_markdown_cell(f"# {VECTORS[0]} {VECTORS[4]}\n")]
    for number, vector in enumerate(VECTORS):
        cells += [new_markdown_cell(f"## {vector}\n\n{vector}\n"), new_code_cell(f"# {vector}")]
        cells[-1].outputs = outputs_of(vector, number)
    text = check(render_report(new_notebook(cells=cells), plan, failure=" ".join(VECTORS))).text
    for number in range(len(VECTORS)):
        assert f"still-here-{number}" in text, VECTORS[number]
    assert "How to reproduce it" in text


@pytest.mark.parametrize("job", ["training", COMPARISON])
def test_every_vector_in_every_place_of_a_run(
    make_run: Callable[..., Run], done_status: RunStatus, plan: Plan, job: str
) -> None:
    everything = " ".join(VECTORS)
    run = make_run(replace(done_status, status="failed", cause=everything, message=everything, stage=everything))
    directory = run.directory.rename(run.directory.with_name(VECTORS[4].replace("/", "")))
    record = {"step": 51, everything: 1.0, "loss_nats": 1.0}
    sample = {"step": 51, "prompt": everything, "text": everything}
    (directory / "metrics.jsonl").open("a").write(json.dumps(record) + "\n")
    (directory / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (directory / "trainer.log").write_text("\n".join(VECTORS))
    session = {"started_at": 1.0, everything: everything, "packages": {everything: everything}}
    (directory / "environment.json").write_text(
        json.dumps({"resolved": {everything: everything}, "sessions": [session]})
    )
    arm = {
        "name": everything,
        "attention": "a",
        "d_feed_forward": 1,
        "n_parameters": 1,
        "forward_flops": 1,
        "cache_bytes": 1,
    }
    compared = {"arms": [arm], "left_out": [{"name": everything, "reason": everything}]}
    (directory / "results.json").write_text(json.dumps({"comparisons": {"flops": compared}}))
    hostile = replace(
        plan,
        run_dir=directory,
        notebook_name=everything,
        question=everything,
        command=everything,
        config={everything: everything},
        differences={everything: (everything, everything)},
        job=job,
    )
    page = check(render_report(new_notebook(), hostile, failure=None))
    assert page.text.count("<script>alert(1)</script>") > 10


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
