"""HTML of others, cut down to what can stand in a report: known elements and attributes that neither run nor fetch."""

import re

import bleach
from bleach.css_sanitizer import CSSSanitizer
from bs4 import BeautifulSoup

# fmt: off
# These go with all that is in them; of other elements that are not allowed only the tag goes.
DROPPED_TAGS = [
    "applet", "audio", "base", "canvas", "datalist", "dialog", "embed", "form", "frame", "frameset", "iframe",
    "link", "math", "meta", "noembed", "noframes", "noscript", "object", "plaintext", "portal", "script", "select",
    "slot", "style", "svg", "template", "textarea", "title", "video", "xmp",
]
ALLOWED_TAGS = frozenset({
    "a", "abbr", "b", "blockquote", "br", "caption", "cite", "code", "col", "colgroup", "dd", "del", "details",
    "div", "dl", "dt", "em", "figcaption", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "i", "img",
    "ins", "kbd", "li", "main", "mark", "nav", "ol", "p", "pre", "q", "s", "samp", "section", "small", "span",
    "strong", "sub", "summary", "sup", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "u", "ul", "var",
})
ALLOWED_ATTRIBUTES = frozenset({
    "align", "alt", "aria-label", "class", "colspan", "data-hydra", "dir", "height", "id", "lang", "open", "role",
    "rowspan", "scope", "start", "title", "width",
})
ALLOWED_STYLES = [
    "background-color", "border", "border-collapse", "color", "font-family", "font-size", "font-style",
    "font-weight", "height", "margin", "margin-bottom", "margin-left", "margin-right", "margin-top", "max-width",
    "min-width", "padding", "text-align", "text-decoration", "vertical-align", "white-space", "width",
]
# fmt: on


def clean_html(markup: str) -> str:
    """The markup without what runs, fetches, or reaches beyond its own place; every tag that is open gets closed."""
    soup = BeautifulSoup(markup, "html.parser")
    for tag in soup.find_all(DROPPED_TAGS):
        tag.decompose()
    cleaned: str = bleach.clean(
        str(soup),
        tags=ALLOWED_TAGS,
        attributes=_is_allowed,
        protocols={"data", "http", "https", "mailto"},
        strip=True,
        css_sanitizer=CSSSanitizer(allowed_css_properties=ALLOWED_STYLES, allowed_svg_properties=[]),
    )
    return cleaned


def _is_allowed(tag: str, name: str, value: str) -> bool:
    """Whether an element may have the attribute."""
    match name:
        case "src":
            return tag == "img" and value.strip().startswith("data:image/")
        case "href":
            return tag == "a" and not value.strip().lower().startswith("data:")
        case "style":
            # An address, in plain or written so that only a browser sees it.
            return not re.search(r"url|\\|@|expression", value, re.IGNORECASE)
    return name in ALLOWED_ATTRIBUTES
