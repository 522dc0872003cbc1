"""Corpora: where text comes from, how it is cut into documents, and which documents are kept for validation."""

import codecs
import hashlib
import importlib.metadata
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hydra.data.spec import DEFAULT_CORPUS, TOKENIZER_KINDS, DataSpec
from hydra.data.tokenizer import read_tokenizer
from hydra.errors import DataError

log = logging.getLogger(__name__)

# torch brings these packages and requirements.lock holds them by hash, so their bytes are the same everywhere.
DEFAULT_CORPUS_PACKAGES = {"jinja2": "3.1.6", "mpmath": "1.3.0", "networkx": "3.6.1", "sympy": "1.14.0"}
DEFAULT_CORPUS_SHA256 = "8de837e1e6e10138572ee321f30594f0b21f04517e9604d994f9781d330cc2e3"

MIN_PIECE_BYTES = 1 << 10
# So that no single long file makes up most of a small validation text.
MAX_PIECE_BYTES = 1 << 16
N_PIECES = 64  # a corpus of one file still becomes about this many documents, so that a small fraction can be kept back
PROBE_BYTES = 1 << 16
SMALL_CORPUS_BYTES = 1 << 20  # so small a corpus is read at once to see whether it can be split


@dataclass(frozen=True)
class Corpus:
    """Documents in corpus order: every one is train text or validation text, equal texts on the same side."""

    train: list[str]
    validation: list[str]
    sha256: str

    @property
    def n_documents(self) -> int:
        """Of both splits."""
        return len(self.train) + len(self.validation)


def check_corpus(spec: DataSpec, root: Path) -> None:
    """Raise DataError unless every part of the corpus is there and holds text, and a tokenizer file can be read.

    Quick: of a large corpus no text is read beyond the beginning of a file. root: what relative paths are relative to.
    """
    n_bytes = 0
    for name in spec.corpus:
        if name == DEFAULT_CORPUS:
            n_bytes += sum(file.stat().st_size for file in _default_corpus_files())
        elif next(_text_files(name, root, probe_only=True), None) is None:
            raise DataError(
                f"A corpus must hold text, but {name!r} ({_resolve(name, root)}) has no utf-8 text file that is "
                f"neither hidden nor blank; give another path"
            )
        else:
            path = _resolve(name, root)
            n_bytes += sum(file.stat().st_size for file in ([path] if path.is_file() else _visible_files(path)))
    if spec.tokenizer not in TOKENIZER_KINDS and not _resolve(spec.tokenizer, root).is_file():
        raise DataError(
            f"tokenizer must be one of {', '.join(TOKENIZER_KINDS)} or the path of an existing tokenizer.json, but got "
            f"{spec.tokenizer!r} and there is no file {_resolve(spec.tokenizer, root)}"
        )
    if spec.tokenizer not in TOKENIZER_KINDS:
        read_tokenizer(_resolve(spec.tokenizer, root))
    if n_bytes < SMALL_CORPUS_BYTES:
        _read_and_split(spec, root)


def read_corpus(spec: DataSpec, root: Path) -> Corpus:
    """Read the whole corpus into memory, cut it into documents and split them.

    One file is one document, except that files longer than a piece (1/64 of the corpus, between 1 KiB and 64 KiB)
    are cut at line ends into pieces of at most that size: a corpus that is one long file can be split too. Blank files
    are left out.
    """
    check_corpus(spec, root)
    corpus = _read_and_split(spec, root)
    n_train, n_validation = len(corpus.train), len(corpus.validation)
    log.info("corpus %s: %d train and %d validation documents", ", ".join(spec.corpus), n_train, n_validation)
    return corpus


def _read_and_split(spec: DataSpec, root: Path) -> Corpus:
    files: list[bytes] = []
    for name in spec.corpus:
        files += _read_default_corpus() if name == DEFAULT_CORPUS else _text_files(name, root)
    n_bytes = sum(map(len, files))
    piece_bytes = min(max(n_bytes // N_PIECES, MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    documents = [piece.decode() for file in files for piece in cut_at_line_ends(file, piece_bytes)]
    train, validation = split_documents(documents, spec.validation_fraction)
    return Corpus(train, validation, text_sha256(documents))


def cut_at_line_ends(text: bytes, piece_bytes: int) -> Iterator[bytes]:
    """Pieces of at most piece_bytes that together are the text; a line that is longer is cut between characters."""
    start = 0
    while len(text) - start > piece_bytes:
        end = text.rfind(b"\n", start, start + piece_bytes) + 1
        if end == 0:
            end = start + piece_bytes
            while text[end] & 0xC0 == 0x80:  # a utf-8 continuation byte: its character began further left
                end -= 1
        yield text[start:end]
        start = end
    yield text[start:]


def split_documents(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """(train, validation), by each document's SHA-256, both in corpus order.

    Validation is the documents with the smallest hashes, as many as hold validation_fraction of the bytes (the last one
    may go past it); at least one, and never the one with the largest hash. Equal documents have equal hashes and so
    never stand on both sides; order and names of files do not matter, and a document more or less moves only those
    whose hashes lie at the border.
    """
    digests = [hashlib.sha256(document.encode()).digest() for document in documents]
    n_bytes_of: dict[bytes, int] = {}
    for document, digest in zip(documents, digests, strict=True):
        n_bytes_of[digest] = n_bytes_of.get(digest, 0) + len(document.encode())
    if len(n_bytes_of) < 2:
        raise DataError(
            f"A corpus must hold at least two different documents, one to train on and one to validate on, but got "
            f"{len(documents)} of one text ({len(documents[0].encode())} bytes); give another file, or one longer than "
            f"{MIN_PIECE_BYTES} bytes, which is cut into several documents"
        )
    wanted = validation_fraction * sum(n_bytes_of.values())
    held_back: set[bytes] = set()
    n_bytes = 0
    for digest in sorted(n_bytes_of)[:-1]:
        held_back.add(digest)
        n_bytes += n_bytes_of[digest]
        if n_bytes >= wanted:
            break
    train = [document for document, digest in zip(documents, digests, strict=True) if digest not in held_back]
    validation = [document for document, digest in zip(documents, digests, strict=True) if digest in held_back]
    return train, validation


def text_sha256(texts: Iterable[str]) -> str:
    """SHA-256 over each text's length (8 bytes, little-endian) and utf-8 bytes: other borders, another hash."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _default_corpus_files() -> list[Path]:
    """The Python source files, tests left out, of the pinned packages, in order of (package, path).

    The list comes from each distribution's RECORD, so files that something else left in the folder do not count.
    """
    files: list[Path] = []
    for package, wanted in DEFAULT_CORPUS_PACKAGES.items():
        remedy = f"run `pip install --force-reinstall --no-deps {package}=={wanted}`, or give another corpus"
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise DataError(
                f"The default corpus is the source of {package}=={wanted}, but no {package} is installed; {remedy}"
            ) from error
        if distribution.version != wanted:
            raise DataError(
                f"The default corpus is the source of {package}=={wanted}, but {package}=={distribution.version} is "
                f"installed; {remedy}"
            )
        listed = [PurePosixPath(file.as_posix()) for file in distribution.files or []]
        sources = sorted(path for path in listed if path.parts[0] == package and _is_source(path))
        located = [Path(str(distribution.locate_file(path))) for path in sources]
        missing = [str(path) for path in located if not path.is_file()]
        if missing or not located:
            raise DataError(
                f"The default corpus is the source of {package}=={wanted}, but its files are not all there (missing: "
                f"{missing[0] if missing else 'the list of files, RECORD'}); {remedy}"
            )
        files += located
    return files


def _is_source(path: PurePosixPath) -> bool:
    is_test = path.name.startswith("test_") or path.name == "conftest.py" or {"test", "tests"} & set(path.parts[:-1])
    return path.suffix == ".py" and not is_test


def _read_default_corpus() -> list[bytes]:
    texts = [path.read_bytes() for path in _default_corpus_files()]
    texts = [text for text in texts if text.strip()]
    found = text_sha256(text.decode(errors="replace") for text in texts)
    if found != DEFAULT_CORPUS_SHA256:
        packages = " ".join(f"{package}=={version}" for package, version in DEFAULT_CORPUS_PACKAGES.items())
        raise DataError(
            f"The default corpus must have the SHA-256 {DEFAULT_CORPUS_SHA256}, but the installed source has {found}: "
            f"a package was changed; run `pip install --force-reinstall --no-deps {packages}`, or give another corpus"
        )
    return texts


def _resolve(name: str, root: Path) -> Path:
    return root / Path(name).expanduser()


def _text_files(name: str, root: Path, probe_only: bool = False) -> Iterator[bytes]:
    """The text files that a path names, in order of their relative path, blank ones left out.

    A named file must be utf-8 text. A folder is searched to any depth; in it hidden files and files that are not utf-8
    text are passed over. probe_only: yield only each file's beginning, and judge the file by that.
    """
    path = _resolve(name, root)
    if path.is_file():
        text = _read_text(path, probe_only)
        if text is None:
            raise DataError(f"A corpus must be utf-8 text, but {path} is not; convert it (iconv) or leave it out")
        if text.strip():
            yield text
        return
    if path.exists() and not path.is_dir():
        raise DataError(
            f"A corpus must be a file or folder, but {path} is neither (a pipe, socket or device); save its text to a "
            "file first"
        )
    if not path.is_dir():
        raise DataError(
            f'A corpus must be "{DEFAULT_CORPUS}" or an existing file or folder, but got {name!r} and there is no '
            f"{path}; correct the path (relative ones start from {root})"
        )
    n_skipped = 0
    for file in _visible_files(path):
        text = _read_text(file, probe_only)
        n_skipped += text is None
        if text is not None and text.strip():
            yield text
    if n_skipped and not probe_only:
        log.warning("corpus %s: left out %d files that are not utf-8 text", path, n_skipped)


def _visible_files(folder: Path) -> list[Path]:
    """Files below folder, sorted by relative path, without those in which a name below folder starts with a dot."""
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = (path for path in relative if not any(part.startswith(".") for part in path.parts))
    return [folder / path for path in sorted(visible, key=lambda path: path.parts)]


def _read_text(path: Path, probe_only: bool) -> bytes | None:
    """The file's bytes, line ends and byte order marks as they are; None when they are not utf-8."""
    try:
        with path.open("rb") as file:
            data = file.read(PROBE_BYTES) if probe_only else file.read()
    except PermissionError as error:
        raise DataError(
            f"Every file of a corpus must be readable, but {path} is not; chmod it or leave it out"
        ) from error
    try:
        # A probe may end in the middle of a character, a file may not.
        is_whole = not probe_only or len(data) < PROBE_BYTES
        codecs.getincrementaldecoder("utf-8")().decode(data, final=is_whole)
    except UnicodeDecodeError:
        return None
    return data
