"""A copy of the source that a run is computed by, so that a run of changed or uncommitted code can be had again."""

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

SOURCE = "source"
PACKAGES = ("hydra", "scripts")
SUFFIXES = frozenset({".py", ".cpp", ".h"})
NO_DATE = (1980, 1, 1, 0, 0, 0)  # the oldest that a zip file knows: the same source is the same file


def source_sha256() -> str:
    """SHA-256 over names and contents of every source file of hydra and scripts that this process imports."""
    return _digest(_read_files())


def keep_source(run_dir: Path) -> None:
    """Keep that source as `source/<first of its SHA-256>.zip`; on one disk all runs of one folder share the file."""
    files = _read_files()
    archive = run_dir / SOURCE / f"{_digest(files)[:16]}.zip"
    if archive.exists():
        return
    archive.parent.mkdir(exist_ok=True)
    for same in run_dir.parent.glob(f"*/{SOURCE}/{archive.name}"):
        with contextlib.suppress(OSError):  # a file system without links
            os.link(same, archive)
            return
    temporary = archive.with_name(f".{archive.name}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as opened:
        for name, content in files.items():
            opened.writestr(zipfile.ZipInfo(name, NO_DATE), content, zipfile.ZIP_DEFLATED)
    temporary.replace(archive)


def _read_files() -> dict[str, bytes]:
    root = Path(__file__).parents[2]
    return {
        str(path.relative_to(root)): path.read_bytes()
        for package in PACKAGES
        for path in sorted((root / package).rglob("*"))
        if path.suffix in SUFFIXES and "tests" not in path.relative_to(root).parts
    }


def _digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)}\0".encode() + content)
    return digest.hexdigest()
