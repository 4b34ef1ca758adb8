"""Find models by name: a path, or `REPO[:QUANT]` for a Hugging Face repository, downloaded unless it is cached.

In: the value of `--model`. Out: the path of a file or folder. Downloads go to the cache that every program built on
huggingface_hub shares; that library also handles tokens and offline mode. It restarts a download when its process has
ended; this module resumes it, and checks each file against the hash that the hub states. Nothing that a server says is
trusted: names become paths only where they are plain, answers and files end at the size that they may have.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from io import RawIOBase
from pathlib import Path

from ..errors import InputError
from .repository import PREFERRED, best_drafters, best_projectors, choices, choose, folder_files

log = logging.getLogger("mlx_gemma4")

Progress = Callable[[int, int], None]  # bytes so far, bytes in all

NAME = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?::(?P<quant>[\w./-]+))?")
TRIES = 5  # in a row without a byte, before a download gives up
WAIT = 0.5  # seconds before the second try, doubled each time
TIMEOUT = 30.0  # seconds of silence
CHUNK = 1 << 18  # bytes
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # a file's: git's SHA-1, or of large files SHA-256; of versions SHA-1
_PART = r"(?!\.{1,2}(?:/|\Z))[^\x00-\x1f\x7f-\x9f/\\:]{1,255}"
PLAIN = re.compile(f"{_PART}(?:/{_PART})*")  # a file's name in a repository
ANSWER = 1 << 26  # bytes of what the hub tells about a repository, at most
RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")
AGENT = "mlx-gemma4"
LARGE = 10_000_000  # bytes; smaller downloads are not logged


def resolve(name: str | Path, *, update: bool = False, progress: Progress | None = None) -> Path:
    """Return the file or folder that a name means; download it if necessary.

    Args:
        name: an existing path, or `REPO[:QUANT]`: "ggml-org/gemma-4-E2B-it-GGUF:Q4_K_M". QUANT may be in any case, or
            a file's name. A repository without GGUF files gives its folder of safetensors.
        update: ask the hub for a newer version of a cached model.
        progress: called as bytes come in.

    Returns:
        the path; of a split file, the first part's. A name that is neither a path nor a repository's is returned as is.

    Raises:
        InputError: no such repository or file in it, no access, no connection.
    """
    match, path = NAME.fullmatch(str(name)), Path(name).expanduser()
    if match is None or path.exists() or (path.suffix.lower() == ".gguf" and match["quant"] is None):
        return path

    return pull(match["repo"], match["quant"] or "", update=update, progress=progress)


def pull(repo: str, quant: str = "", *, update: bool = True, progress: Progress | None = None) -> Path:
    """As `resolve` of `REPO:QUANT`, which is no path here."""
    from huggingface_hub.errors import HFValidationError

    here = _cached(repo, quant)
    # Without a quantization, the cached one may differ from the hub's default.
    if here and not update and (quant or here.is_dir() or PREFERRED[0] in here.name.upper()):
        return here
    try:
        return _fetch_model(repo, quant, progress)
    except (InputError, HFValidationError, _transport_error(), OSError) as error:
        problem = error if isinstance(error, InputError) else InputError(f"{repo}: {_explained(error, repo)}")
        if here is None:
            raise problem from None
        log.warning("%s. Taking what is here: %s", problem, here.name)
        return here


def _fetch_model(repo: str, quant: str, progress: Progress | None) -> Path:
    """Download the hub's current version of a model; cached files are not downloaded again."""
    commit, sizes = _about(repo)
    files = () if quant or choices(list(sizes)) else folder_files(list(sizes))
    wanted = files or choose(repo, list(sizes), quant).files
    if not files:
        name = wanted[0].rsplit("/", 1)[-1]
        beside = best_drafters(sizes, name)[:1] + best_projectors(sizes, name)[:1]
        wanted += tuple(file for file in beside if file not in wanted)
    if bad := [file for file in wanted if not PLAIN.fullmatch(file)]:
        raise InputError(f"{repo}: its file {bad[0]!r} has a name that no file may have here; name another")
    done, total, paths = 0, sum(sizes[file] for file in wanted), []
    for file in wanted:

        def count(n: int, before: int = done) -> None:
            if progress:
                progress(before + n, max(total, before + n))

        paths.append(_fetch_file(repo, file, commit, count))
        done += sizes[file]
    reference = cache_folder_of(repo) / "refs" / "main"  # the version to use offline
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    return paths[0].parent if files else paths[0]


def _about(repo: str) -> tuple[str, dict[str, int]]:
    """Return a repository's newest version, and the sizes of its files, as the hub tells. Raises InputError."""
    from huggingface_hub import constants, get_session, hf_raise_for_status
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils._validators import validate_repo_id

    validate_repo_id(repo)
    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled("offline")
    url, answer = f"{constants.ENDPOINT}/api/models/{repo}?blobs=true", bytearray()
    with get_session().stream("GET", url, headers=_headers(), timeout=TIMEOUT, follow_redirects=True) as response:
        for piece in response.iter_raw():
            answer += piece
            if len(answer) > ANSWER:
                raise InputError(f"{repo}: {constants.ENDPOINT} tells too much about it; try again later")
        made = type(response)(response.status_code, content=bytes(answer), request=response.request)
        made.headers.update({name: x for name, x in response.headers.items() if name.lower().startswith("x-")})
        hf_raise_for_status(made)
    try:
        about = json.loads(answer)
        sizes = {file["rfilename"]: file.get("size") or 0 for file in about["siblings"]}
        good = HASH.fullmatch(about["sha"]) and all(
            isinstance(name, str) and type(size) is int and 0 <= size < 1 << 60 for name, size in sizes.items()
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        good = None
    if not good:
        raise InputError(f"{repo}: what {constants.ENDPOINT} tells about it can't be used; check HF_ENDPOINT")
    return about["sha"], sizes


def _headers() -> dict[str, str]:
    """Return what a request to the hub says: who asks, and that nothing be packed on its way."""
    from huggingface_hub import get_token

    token = get_token()
    return {"Accept-Encoding": "identity", "User-Agent": AGENT} | (
        {"Authorization": f"Bearer {token}"} if token else {}
    )


# ---------------------------------------------------------------- the cache


def cache_root() -> Path:
    """Return huggingface_hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cache_folder_of(repo: str) -> Path:
    """Return the repository's folder in huggingface_hub's cache, with blobs/, snapshots/ and refs/ in it."""
    return cache_root() / f"models--{repo.replace('/', '--')}"


def latest_version(repo: str) -> tuple[Path, list[str]]:
    """Return the folder of the version downloaded last, and its files. Raises OSError or ValueError."""
    commit = (cache_folder_of(repo) / "refs" / "main").read_text().strip()
    if not HASH.fullmatch(commit):
        raise ValueError(commit)
    snapshot = cache_folder_of(repo) / "snapshots" / commit
    return snapshot, [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]


def _cached(repo: str, quant: str) -> Path | None:
    """Return the path of a complete model in the version downloaded last, or None."""
    try:
        snapshot, files = latest_version(repo)
        if not quant and not choices(files):
            return snapshot if is_whole(snapshot, files) else None
        return snapshot / choose(repo, files, quant).files[0]
    except (OSError, ValueError, InputError):
        return None


def is_whole(snapshot: Path, files: Sequence[str]) -> bool:
    """True if a folder of safetensors has every file that its index, if it has one, names."""
    index = "model.safetensors.index.json"
    if index not in files:
        return bool(folder_files(files))
    return set(json.loads((snapshot / index).read_text())["weight_map"].values()) <= set(files)


def _fetch_file(repo: str, file: str, commit: str, count: Callable[[int], None]) -> Path:
    """Return the path of one file of a repository in the cache; download it if necessary."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    here = cache_folder_of(repo) / "snapshots" / commit / file
    if not here.is_file():
        url = hf_hub_url(repo, file, revision=commit)
        about = get_hf_file_metadata(url, timeout=TIMEOUT)
        if not HASH.fullmatch(about.etag or "") or about.size is None or about.size < 0:
            raise InputError(f"{url}: the server states no hash and size to check it by; check HF_ENDPOINT")
        blob = cache_folder_of(repo) / "blobs" / str(about.etag)
        if not blob.is_file():
            _fetch_blob(url, _headers(), blob, about.size, count)
        here.parent.mkdir(parents=True, exist_ok=True)
        here.unlink(missing_ok=True)  # a link to a blob that is gone
        try:
            here.symlink_to(os.path.relpath(blob, here.parent))
        except OSError:  # a disk without links
            blob.replace(here)
    count(os.stat(here).st_size)
    return here


# ---------------------------------------------------------------- downloading


def _fetch_blob(url: str, headers: dict[str, str], blob: Path, size: int, count: Callable[[int], None]) -> None:
    """Download to `blob`, whose name is the hub's hash, resuming an earlier try."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(blob.name + ".part")
    with partial.open("a+b", buffering=0) as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{url}: another program is downloading this; wait for it") from None
        if (done := out.seek(0, os.SEEK_END)) > size:
            done = out.truncate(0)
        free = shutil.disk_usage(blob.parent).free
        if free < size - done:
            raise InputError(
                f"{url}: needs {(size - done) / 1e9:.1f} GB of disk in {blob.parent} and {free / 1e9:.1f} GB are free; "
                "make room, or set HF_HOME to a folder with more",
                exit_code=3,
            )
        if done:
            log.warning("Going on from %.2f of %.2f GB", done / 1e9, size / 1e9)
        elif size > LARGE:
            log.warning("Downloading %.2f GB: %s", size / 1e9, url)
        try:
            passed = _fetch_rest(out, url, headers, size, blob.name, count)
        except InputError:
            partial.unlink()
            raise
        if not passed:
            partial.unlink()
            raise InputError(f"{url}: was damaged on its way; download it again")
        os.replace(partial, blob)


class _Check:
    """Tells whether bytes have a hash: SHA-256, or SHA-1 as git takes it, or plain."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self._all = [hashlib.sha256()] if len(name) == 64 else [hashlib.sha1(b"blob %d\0" % size), hashlib.sha1()]

    def update(self, data: bytes) -> None:
        for one in self._all:
            one.update(data)

    @property
    def passed(self) -> bool:
        return any(one.hexdigest() == self.name for one in self._all)


def _fetch_rest(
    out: RawIOBase, url: str, headers: dict[str, str], size: int, name: str, count: Callable[[int], None]
) -> bool:
    """Download the bytes that a file lacks, over several connections if necessary; True if their hash is `name`.

    Gives up after TRIES without a byte. Raises InputError if more comes than `size`.
    """
    from huggingface_hub import get_session, hf_raise_for_status

    digest, tries, ranges = _Check(name, size), 0, True
    out.seek(0)
    while chunk := out.read(CHUNK):
        digest.update(chunk)
    while out.tell() < size:
        before, reason = out.tell(), "it ended early"
        if before and not ranges:  # the server sent something else than was asked for
            out.truncate(0)
            out.seek(0)
            digest, before = _Check(name, size), 0
        asked = {**headers, "Range": f"bytes={before}-"} if before else headers
        try:
            with get_session().stream("GET", url, headers=asked, timeout=TIMEOUT, follow_redirects=True) as response:
                if response.status_code >= 400:
                    if response.status_code == 416 and before:
                        ranges = False
                        continue
                    response = type(response)(response.status_code, headers=response.headers, request=response.request)
                hf_raise_for_status(response)
                if response.status_code == 206:
                    sent = RANGE.fullmatch(response.headers.get("Content-Range", ""))
                    right = sent and int(sent[1]) == before <= int(sent[2]) < size and sent[3] in ("*", str(size))
                    if not right and (before == 0 or not ranges):
                        raise InputError(f"{url}: the server sends another part than was asked for; try again later")
                    if not right:
                        ranges = False
                        continue
                elif before:
                    out.truncate(0)  # a server without range requests sends the whole file
                    out.seek(0)
                    digest = _Check(name, size)
                for chunk in response.iter_raw():
                    if out.tell() + len(chunk) > size:
                        raise InputError(f"{url}: sends more than the {size} bytes it has; download it again")
                    out.write(chunk)
                    digest.update(chunk)
                    count(out.tell())
        except _transport_error() as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if tries == TRIES or (status and status < 500 and status != 429):
                raise
            reason = " ".join(str(error).split())[:120] or type(error).__name__
        tries = 0 if ranges and out.tell() > before else tries + 1
        if tries > TRIES:
            raise InputError(f"{url}: the server sends nothing; try again later")
        if out.tell() < size:
            log.info("Connection lost (%s); going on from byte %d", reason, out.tell())
            time.sleep(WAIT * 2 ** min(tries, 4))
    return digest.passed


# ---------------------------------------------------------------- errors


def _transport_error() -> type[Exception]:
    """Return the exception that huggingface_hub's client, which has changed over time, raises on HTTP errors."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    return base


def _explained(error: Exception, repo: str) -> str:
    """Return what one of huggingface_hub's exceptions says of a repository, and what to do."""
    from huggingface_hub import constants, errors

    host, login = constants.ENDPOINT, "log in with `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return f"is gated; accept its terms at {host}/{repo}, then {login} or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"neither a path here nor a repository that {host} shows; check the name, or {login} if it is private"
    if isinstance(error, errors.HFValidationError):
        return f"no name of a repository: {error}"
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return "isn't here whole and can't be downloaded now; unset HF_HUB_OFFLINE"
    if isinstance(error, _transport_error()):
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return f"{host} refuses ({status}); {login} or set HF_TOKEN"
        what = f"{host} answers {status}" if status else f"{host} can't be reached: {error or type(error).__name__}"
        return f"{what}; try again later, a download goes on where it stopped"
    return f"can't be kept in {cache_folder_of(repo)}: {getattr(error, 'strerror', None) or error}"
