"""Text that would run in a browser, put wherever a notebook or a run holds text, and what a report must not hold."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from nbformat.v4 import new_notebook

from hydra.notebook.plan import Plan
from hydra.notebook.report import render_report
from hydra.runtime import paths

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
SHOWS = """
import sys
from IPython.display import display
from hydra.testing.hostile.pages import VECTORS, forms_of, mark_of
for number, vector in enumerate(VECTORS):
    for data, metadata in forms_of(vector):
        display(data, raw=True, metadata=metadata)
    print(vector, file=sys.stderr)
    print(mark_of(number))
"""
"""A cell that displays each vector in every form, and behind it a mark that no open tag may swallow."""


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
        """Elements and attributes that run, fetch or reach beyond their place."""
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
        """A comment, in which browsers and sanitisers may see different ends."""
        self.wrong.append(("comment", data))

    def handle_data(self, data: str) -> None:
        """Text, which is harmless."""
        self.text += data


def read_page(path: Path) -> Page:
    """A report, whose policy must be ours, in its head and the only one."""
    page = Page(path.read_text())
    if page.policies != [POLICY]:
        page.wrong.append(("policies", page.policies))
    return page


def mark_of(number: int) -> str:
    """What stands behind a vector, to tell that it and all before it arrived."""
    return f"still-here-{number}."


def count_marks(page: Page) -> int:
    """How many vectors have arrived on the page, their marks behind them."""
    return sum(mark_of(number) in page.text for number in range(len(VECTORS)))


def forms_of(vector: str) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Every form of display data in which a notebook may hold the vector, with its metadata."""
    marked = f"{vector}\n\n"
    yield {"text/html": f"<div>{marked}</div>"}, {}
    for kind in ("text/markdown", "text/latex", "text/plain"):
        yield {kind: marked}, {}
    for kind in ("image/png", "image/jpeg"):
        yield {kind: vector, "text/plain": vector}, {}
    yield {"image/svg+xml": vector}, {"image/svg+xml": {"alt": vector}}
    yield {"image/png": "xx"}, {"image/png": {"alt": vector}}
    yield {"application/javascript": vector, vector: vector, "text/plain": vector}, {}


def render_with_vectors(run_dir: Path, job: str) -> Path:
    """Put every vector into every text of a run, and of the plan of a `job` on it; returns its report."""
    text = " ".join(f"{vector} {mark_of(number)}" for number, vector in enumerate(VECTORS))
    state = json.loads((run_dir / paths.STATE).read_text())
    said = {"status": "failed", "cause": text, "message": text, "stage": text}
    (run_dir / paths.STATE).write_text(json.dumps({**state, **said}))
    with (run_dir / paths.METRICS).open("a") as metrics:
        metrics.write(json.dumps({"step": 51, text: 1.0, "loss_nats": 1.0}) + "\n")
    (run_dir / paths.SAMPLES).write_text(json.dumps({"step": 51, "prompt": text, "text": text}) + "\n")
    (run_dir / paths.LOG).write_text("\n".join(VECTORS))
    session = {"started_at": 1.0, text: text, "packages": {text: text}}
    (run_dir / paths.ENVIRONMENT).write_text(json.dumps({"resolved": {text: text}, "sessions": [session]}))
    sizes = {"d_feed_forward": 1, "n_parameters": 1, "forward_flops": 1, "cache_bytes": 1}
    compared = {"arms": [{"name": text, "attention": "a", **sizes}], "left_out": [{"name": text, "reason": text}]}
    (run_dir / paths.RESULTS).write_text(json.dumps({"comparisons": {"flops": compared}}))
    plan = Plan(
        run_dir=run_dir,
        notebook_name=text,
        question=text,
        command=text,
        config={text: text},
        differences={text: (text, text)},
        job=job,
    )
    return render_report(new_notebook(), plan, failure=None)
