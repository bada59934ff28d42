"""Files of a public source: taken from where the user has them, else downloaded there, with resume.

What is under way lies in NAME.part, and what it is a part of in NAME.part.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from recbole_mm.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from dataset_tools.net import Fetcher, LaterError

HOSTS = (
    *("snap.stanford.edu", "jmcauley.ucsd.edu", "mcauleylab.ucsd.edu", "datarepo.eng.ucsd.edu"),
    *("files.grouplens.org", "recsys.westlake.edu.cn"),
)
_MD5 = re.compile(r"\b[0-9a-fA-F]{32}\b")
_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")
_NO_SUCH_RANGE = 416
_CHUNK = 1 << 20
# RuntimeError is a password that is wanted, or a way of packing that Python does not know.
_BROKEN = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, RuntimeError, EOFError)


class GoneError(UserError):
    """There is no such file at its source."""


@dataclass(frozen=True)
class Remote:
    """A file at its source.

    Attributes:
        url: its address.
        page: where the source describes it and states its terms.
        md5_url: address of its checksum, where the source publishes one.
    """

    url: str
    page: str
    md5_url: str | None = None

    @property
    def name(self) -> str:
        """Of the file."""
        return PurePosixPath(urlsplit(self.url).path).name

    def at(self, mirror: str) -> Remote:
        """The same file, and its checksum, in another place."""
        place = f"{mirror.rstrip('/')}/{self.name}"
        return Remote(place, self.page, f"{place}.md5" if self.md5_url else None)


def obtain(raw: Path, remote: Remote, mirror: str | None = None) -> Path:
    """Downloads a file into the folder of raw files, or goes on with what is there of it.

    Args:
        raw: the folder, made where there is none.
        remote: the file.
        mirror: address of a folder that has it under the same name; None: the source.

    Returns:
        Where it is now.

    Raises:
        GoneError: the source has none.
        UserError: it could not be had for another reason; what is there of it stays.
    """
    try:
        from dataset_tools.net import Fetcher, FetchError, Guard
    except ImportError as error:
        raise UserError(
            f"{raw / remote.name} is not there, and downloading needs httpx2 ({error}): "
            f"`pip install 'recbole-mm[fetch]'`, or get it from {remote.page}."
        ) from None
    place = remote.at(mirror) if mirror else remote
    hosts = {*HOSTS, urlsplit(place.url).hostname or ""}
    guard = Guard(frozenset(hosts), allow_local=bool(mirror) and _is_local(place.url))
    fetcher = Fetcher(guard, timeout_s=60)
    target = raw / remote.name
    raw.mkdir(parents=True, exist_ok=True)
    try:
        with alone(target, "downloading"):
            if not target.is_file():  # else another command was faster
                print(f"Downloading {place.url} (its terms: {remote.page})")
                download(place, target, fetcher)
    except FetchError as error:
        kind = GoneError if error.gone else UserError
        raise kind(
            f"{target} is not there, and {place.url} cannot be downloaded: {error}. Try again, "
            f"which goes on where it stopped, or put the file there yourself; see {remote.page}."
        ) from None
    finally:
        fetcher.close()
    return target


def _is_local(url: str) -> bool:
    """Whether an address is one of this machine or of a private network."""
    import httpx2

    from dataset_tools.net import FetchError, Guard, LaterError

    try:
        plain = httpx2.URL(scheme="https", host=httpx2.URL(url).host)
        Guard(frozenset({plain.host})).addresses(plain)  # known, so all it can mind is where it is
    except FetchError as error:
        return bool(plain.host) and not isinstance(error, LaterError)
    except httpx2.InvalidURL:
        pass
    return False


@contextmanager
def alone(target: Path, doing: str) -> Iterator[None]:
    """Keeps other commands from making the same file or folder meanwhile.

    Args:
        target: what is made.
        doing: what is done to it, for the sentence.

    Raises:
        UserError: another command is at it.
    """
    if fcntl is None:
        yield
        return
    place = target.with_name(f".{target.name}.lock")
    with place.open("wb") as file:
        if not _locked(file, place):
            raise UserError(f"Another command is {doing} {target}: wait for its end, or stop it.")
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def _locked(file: IO[bytes], place: Path) -> bool:
    """Takes the lock, unless another has it or its file went away with another's end."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), place.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # a file system without locks
        return True


def download(remote: Remote, target: Path, fetcher: Fetcher) -> None:
    """Downloads a file; it takes its name once it is whole.

    Raises:
        FetchError: it could not be had, or its checksum is another than the source publishes.
        UserError: the disk has no room for it.
    """
    from dataset_tools.net import LaterError

    part = Part(target, remote.url)
    while not part.is_whole:
        before = part.bytes
        try:
            fetcher.tried(lambda: _go_on(remote.url, part, fetcher))
        except LaterError:
            if part.bytes <= before:  # as long as something comes it is worth trying
                raise
    _check_md5(remote, part, fetcher)
    part.finish()


def _go_on(url: str, part: Part, fetcher: Fetcher) -> None:
    """Asks for the rest once.

    Raises:
        FetchError: it cannot be had.
        LaterError: nothing came, or what is no rest of what is there, which is then deleted.
    """
    from dataset_tools.net import FetchError, LaterError

    try:
        with fetcher.opened(url, part.headers()) as response:
            if response.status_code == 200:
                part.begin(response.headers)
            elif not part.resume(response.headers):
                raise _anew(part)
            before = part.bytes
            _append(response, part, fetcher)
    except FetchError as error:
        if part.bytes and error.status == _NO_SUCH_RANGE:
            raise _anew(part) from None
        raise
    if not part.is_whole and part.bytes <= before:
        raise LaterError("nothing more comes")


def _anew(part: Part) -> LaterError:
    from dataset_tools.net import LaterError

    part.discard()
    return LaterError("the answer does not go on with what was there, so it is begun anew")


def _append(response: Any, part: Part, fetcher: Fetcher) -> None:
    from dataset_tools.net import LaterError

    with (
        part.path.open("ab") as file,
        tqdm(
            desc=part.target.name,
            total=part.size,
            initial=part.bytes,
            unit="B",
            unit_scale=True,
            ncols=100,
        ) as bar,
    ):
        for data in fetcher.parts(response):
            bar.update(file.write(data))
            if part.size is not None and file.tell() > part.size:
                raise LaterError(f"more comes than its {part.size:,} bytes")
    part.has_ended = True


class Part:
    """A file under way.

    Args:
        target: what it becomes.
        url: where it comes from.

    Attributes:
        path: where its bytes are.
        size: of the whole, None where the source does not say.
        has_ended: whether an answer came to its end.
    """

    def __init__(self, target: Path, url: str) -> None:
        self.target, self.url = target, url
        self.path = target.with_name(f"{target.name}.part")
        self._about = target.with_name(f"{target.name}.part.json")
        about = self._read()
        self._tag: str = about.get("tag") or ""
        self.size: int | None = about.get("size") if self._tag else None
        self.has_ended = False

    def _read(self) -> dict[str, Any]:
        """What was said of it; nothing where it is another file's, or broken."""
        try:
            about = json.loads(self._about.read_text(encoding="utf-8"))
            return asdict(_About(**about)) if about.get("url") == self.url else {}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    @property
    def bytes(self) -> int:
        """That are there."""
        return self.path.stat().st_size if self.path.is_file() else 0

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are there: as many as the source says, where it says how many."""
        return self.has_ended if self.size is None else self.bytes == self.size

    def headers(self) -> dict[str, str]:
        """Those that ask for the rest, if the file is still the same."""
        is_too_long = self.size is not None and self.bytes > self.size
        if not self._tag or not self.bytes or is_too_long:
            return {}
        return {"Range": f"bytes={self.bytes}-", "If-Range": self._tag}

    def resume(self, headers: Any) -> bool:
        """Whether an answer is the rest that was asked for, of the same file."""
        found = _RANGE.fullmatch(headers.get("Content-Range", "").strip())
        name = "Last-Modified" if self._tag.endswith("GMT") else "ETag"
        if not self.headers() or not found or headers.get(name, self._tag) != self._tag:
            return False
        self.size = int(found[2]) if self.size is None else self.size
        return (int(found[1]), int(found[2])) == (self.bytes, self.size)

    def begin(self, headers: Any) -> None:
        """Starts anew with what the source now says of the file.

        Raises:
            UserError: the disk has no room for it.
        """
        etag = headers.get("ETag", "")
        self._tag = headers.get("Last-Modified", "") if etag.startswith("W/") else etag
        self._tag = self._tag or headers.get("Last-Modified", "")
        length = headers.get("Content-Length", "")
        self.size, self.has_ended = int(length) if length.isdecimal() else None, False
        free = shutil.disk_usage(self.path.parent).free
        if self.size is not None and self.size > free:
            raise UserError(
                f"{self.target} takes {self.size:,} bytes and {free:,} are free; make room or give "
                "another --raw_dir."
            )
        self.path.write_bytes(b"")
        about = _About(self.url, self._tag, self.size)
        self._about.write_text(json.dumps(asdict(about)), encoding="utf-8")

    def discard(self) -> None:
        """Forgets everything."""
        self._tag, self.size, self.has_ended = "", None, False
        self.path.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)

    def finish(self) -> None:
        """Gives the whole file its name.

        Raises:
            FetchError: it is not whole any more.
        """
        if not self.is_whole:
            from dataset_tools.net import FetchError

            raise FetchError(f"{self.path} was changed meanwhile")
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self.path, self.target)
        self._about.unlink(missing_ok=True)


@dataclass(frozen=True)
class _About:
    """What `NAME.part.json` says: address, what tells this content from another, bytes in all."""

    url: str
    tag: str
    size: int | None


def _check_md5(remote: Remote, part: Part, fetcher: Fetcher) -> None:
    from dataset_tools.net import FetchError

    published = _published(remote.md5_url, fetcher) if remote.md5_url else None
    if published is None:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with part.path.open("rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    if digest.hexdigest() != published:
        part.discard()
        raise FetchError("its checksum is not the one that the source publishes, so it was deleted")


def _published(url: str, fetcher: Fetcher) -> str | None:
    """The checksum at an address; None where there is no such address."""
    from dataset_tools.net import FetchError

    try:
        text = fetcher.read(url, 10_000).decode("utf-8", "replace")
    except FetchError as error:
        if error.gone and error.status is not None:
            print(f"No checksum is published at {url}: only size and ETag are compared.")
            return None
        raise FetchError(f"its checksum {url} cannot be read ({error})") from None
    found = _MD5.search(text)
    if found is None:
        raise FetchError(f"there is no checksum in {url}")
    return found.group().lower()


def unpack(archive: Path, folder: Path, wanted: Callable[[str], bool], most: int) -> None:
    """Unpacks files of a zip archive into one folder, whatever folders they have in it.

    Args:
        archive: the file.
        folder: where they go.
        wanted: by a file's name without folders.
        most: bytes of one file at most; a larger one is left out.

    Raises:
        UserError: the archive is broken or wants a password.
    """
    left_out = 0
    try:
        with zipfile.ZipFile(archive) as packed:
            members = {PurePosixPath(info.filename).name: info for info in packed.infolist()}
            members = {name: info for name, info in members.items() if _is_plain(name)}
            for name, info in tqdm(members.items(), desc=archive.name, unit="file", ncols=100):
                if wanted(name) and not info.is_dir():
                    left_out += not _unpack_one(packed, info, folder / name, most)
    except _BROKEN as error:
        raise UserError(
            f"{archive} cannot be unpacked ({error}): delete {archive} and give the command again."
        ) from None
    if left_out:
        print(f"{archive.name}: files left out, larger than {most:,} bytes: {left_out:,}")


def _is_plain(name: str) -> bool:
    return bool(name) and not name.startswith(".") and not set(name) & set("\\/:\0")


def _unpack_one(packed: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, most: int) -> bool:
    """Whether it is small enough: the size is what comes, not what the archive says of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    left = most
    try:
        with packed.open(info) as source, fresh.open("wb") as file:
            while left >= 0 and (data := source.read(min(_CHUNK, left + 1))):
                left -= len(data)
                file.write(data)
        if left >= 0:
            os.replace(fresh, target)
    finally:
        fresh.unlink(missing_ok=True)
    return left >= 0
