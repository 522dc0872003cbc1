"""Canary secrets, what tells them in every way, and the search for them in all that a job left."""

import base64
from collections.abc import Sequence
from pathlib import Path

CORES = ("cAnaryEnv91", "cAnaryTok72", "cAnaryPwd53", "cAnaryLin34", "cAnaryPar15")
"""The part of each canary that no spelling of text changes."""
ENVIRONMENT = {
    "CANARY_API_KEY": f"""k-"{CORES[0]}'<b>&\\n/é+{{x}}""",
    "CANARY_TOKEN": f"ghp_{CORES[1]}0000",
    "CANARY_PASSWORD": f"first-{CORES[2]}\nsecond-{CORES[3]}",
}
PARAMETER = f"""p'"{CORES[4]}\\ü%s"""
LEAKS = """
import base64, json, logging, os, sys, time
from urllib.parse import quote
from IPython.display import HTML, Latex, Markdown, SVG, display
os.environ["CANARY_OTHER"] = token
secrets = [token, *(os.environ[name] for name in ("CANARY_API_KEY", "CANARY_TOKEN", "CANARY_PASSWORD"))]
print(*secrets)
print(secrets, json.dumps(secrets), json.dumps(json.dumps(secrets)))
print(*(base64.b64encode(("x" * n + secret).encode()).decode() for n in range(3) for secret in secrets))
print(*(base64.urlsafe_b64encode(secret.encode()).decode() for secret in secrets), *map(quote, secrets))
print(secrets[2][:9], end="", flush=True)
print(secrets[2][9:], file=sys.stdout)
logging.getLogger().error("%s", secrets)
for kind in (HTML, Latex, Markdown):
    display(kind(f"<p title='{secrets[2]}'>{secrets[2]} {secrets[3]}</p>"))
display(SVG(f"<svg xmlns='http://www.w3.org/2000/svg'><text>{secrets[2]}</text></svg>"))
display({"text/plain": "a mapping", "application/json": {"secrets": secrets}}, raw=True, metadata={"secrets": secrets})
dict(secrets=secrets)
"""
"""A cell of a notebook whose parameter `token` is PARAMETER, in an environment that holds ENVIRONMENT."""


def spellings(core: str) -> set[str]:
    """The core, and the characters of base64 that it alone decides, for each place of a longer text."""
    # None of them is + or /, so addresses (RFC 4648, section 5) spell them the same.
    return {core, *(base64.b64encode((before + core).encode()).decode()[4:-4] for before in ("", "x", "xx"))}


def find_leaks(files: Sequence[Path]) -> list[str]:
    """Each file with each canary that it holds, in whatever spelling."""
    needles = {core: [spelling.encode() for spelling in spellings(core)] for core in CORES}
    return [
        f"{path} holds {core}"
        for path in files
        for content in [path.read_bytes()]
        for core, spelled in needles.items()
        if any(needle in content for needle in spelled)
    ]
