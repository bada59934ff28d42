"""Fetches the pictures of a dataset from the addresses in its NAME.urls.

Pictures are decoded, brought to a bounded size, saved as JPEG under the hash of their content and
entered in NAME.image. Whatever was fetched, or is gone at its source, stands in a manifest: the
same command goes on after a kill, and asks again only for what failed for the moment.

  python -m dataset_tools images amazon-beauty --max_side 512 --rate 20
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from recbole_mm.data.atomic import IMAGE, read_images, read_urls, write_images
from recbole_mm.data.images import BROKEN, MAX_BYTES, BadImageError, decode, digest
from recbole_mm.errors import UserError

if TYPE_CHECKING:
    from dataset_tools.net import Fetcher

HOSTS = (  # of the sources' pictures
    *("*.media-amazon.com", "*.ssl-images-amazon.com", "images.amazon.com"),
    "recsys.westlake.edu.cn",
)
MANIFEST = "manifest.jsonl"
_LONGEST_SIDE = 16_384  # pixels; a JPEG can have four times as many
_FILE = re.compile(r"[0-9a-f]{2}/[0-9a-f]{32}\.jpg")
_TOLD = 5  # hosts that are named
Urls = Mapping[str, Sequence[str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m dataset_tools images`."""
    add = parser.add_argument
    add("name", help="of the dataset")
    add("--data_path", default="dataset", help="where datasets lie (dataset)")
    add("--limit", type=int, default=0, help="pictures of so many items only (0: all)")
    add("--per_item", type=int, default=1, help="pictures an item, the first that are usable (1)")
    add("--max_side", type=int, default=512, help="pixels of the longer side at most (512)")
    add("--quality", type=int, default=90, help="of the JPEG files, 1 to 95 (90)")
    add("--workers", type=int, default=8, help="requests under way at once (8)")
    add("--rate", type=float, default=20.0, help="requests a second at most; 0: any number (20)")
    add("--tries", type=int, default=4, help="of an address before it is left to the next run (4)")
    add("--hosts", default="", metavar="A,B", help="further hosts that may be asked; *.NAME too")
    add("--allow_local", action="store_true", help="also private networks and this machine by http")
    add("--again", action="store_true", help="ask again for what was gone or no picture")


def run(arguments: argparse.Namespace) -> None:
    """Fetches what is missing and prints what there is.

    Raises:
        UserError: a flag is out of range, the dataset has no addresses, or its folder cannot be
            written to.
    """
    _check(arguments)
    folder = Path(arguments.data_path) / arguments.name
    urls = addresses(folder, arguments.limit)
    images = folder / "images"
    images.mkdir(exist_ok=True)
    with Manifest(images / MANIFEST, images, arguments.again) as manifest:
        try:
            stopped = _fetch_all(urls, manifest, images, arguments)
        finally:  # whatever goes wrong, what has come counts
            rows = _enter(folder, urls, manifest, arguments.per_item)
    _tell(urls, manifest, rows)
    if stopped:
        print("Interrupted. The same command goes on from here.")
        raise SystemExit(130)


def _check(arguments: argparse.Namespace) -> None:
    least = {"limit": 0, "per_item": 1, "max_side": 16, "quality": 1, "workers": 1, "tries": 1}
    for flag, lowest in least.items():
        if getattr(arguments, flag) < lowest:
            raise UserError(f"--{flag} is {getattr(arguments, flag)}: give {lowest} or more.")
    if not arguments.rate >= 0:
        raise UserError(f"--rate is {arguments.rate}: give 0 or more.")
    for flag, highest in {"quality": 95, "max_side": _LONGEST_SIDE, "workers": 64}.items():
        if getattr(arguments, flag) > highest:
            raise UserError(f"--{flag} is {getattr(arguments, flag)}: give {highest} or less.")


def addresses(folder: Path, limit: int = 0) -> dict[str, list[str]]:
    """The addresses of each item's pictures, in order of preference.

    Raises:
        UserError: the dataset has none.
    """
    path = folder / f"{folder.name}.urls"
    if not path.is_file():
        raise UserError(
            f"There is no {path}: make the dataset with a converter whose source has addresses of "
            "pictures, such as amazon2014, and --images."
        )
    found: dict[str, list[str]] = {}
    for item, url in read_urls(path):
        if item in found or not limit or len(found) < limit:
            found.setdefault(item, []).append(url)
    return found


# ---------------------------------------------------------------- what is known


class Manifest:
    """What became of each address: its picture's file, or why there will be none.

    One record a line, added when it is known, by any thread; a half-written last line is passed
    over.

    Args:
        path: of the file.
        images: the folder of the pictures.
        again: whether addresses without a picture are forgotten.

    Attributes:
        files: picture below `images` by address.
        gone: reason by address.
        refused: reason by address of what is not asked for, or not given; nothing that is kept,
            since a flag may allow it.
        failed: reason by address of what failed in this run, and may not in the next.
        made: every file that stands in the manifest.
    """

    def __init__(self, path: Path, images: Path, again: bool = False) -> None:
        self.files: dict[str, str] = {}
        self.gone: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.made: set[str] = set()
        for record in _records(path):  # the last one of an address counts
            url, file, why = (record.get(key) for key in ("url", "file", "why"))
            if isinstance(url, str) and isinstance(file, str) and _FILE.fullmatch(file):
                self.made.add(file)
                self.gone.pop(url, None)
                if _has_bytes(images / file):
                    self.files[url] = file
            elif isinstance(url, str) and isinstance(why, str) and not again:
                self.gone[url] = why
        self._lock = threading.Lock()
        self._file = path.open("ab+")
        if self._file.tell() and not _ends_whole(path):
            self._file.write(b"\n")

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def fetched(self, url: str, file: str) -> None:
        """The address has this picture."""
        self.files[url] = file
        self.made.add(file)
        self._add({"url": url, "file": file})

    def lost(self, url: str, why: str) -> None:
        """The address has no picture, and never will."""
        self.gone[url] = why
        self._add({"url": url, "why": why})

    def _add(self, record: Mapping[str, str]) -> None:
        with self._lock:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()

    def wanted(self, urls: Urls, per_item: int) -> list[str]:
        """What is to be fetched next, each address once: an item's next ones, as many as it lacks.

        Empty when nothing is left that could be fetched in this run.
        """
        found: dict[str, None] = {}
        for candidates in urls.values():
            lacking = per_item
            for url in candidates:
                if url in self.gone or url in self.refused:
                    continue
                if url not in self.files and url not in self.failed:
                    found[url] = None
                lacking -= 1  # a failed one keeps its place: another day it may be there
                if not lacking:
                    break
        return list(found)

    def pictures(self, candidates: Sequence[str], per_item: int) -> list[str]:
        """The first files that an item's addresses have; equal pictures once."""
        return list(dict.fromkeys(self.files[url] for url in candidates if url in self.files))[
            :per_item
        ]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # half-written when the run was killed
                continue
            if isinstance(record, dict):
                yield record


def _has_bytes(path: Path) -> bool:
    """Whether a file is there and not empty, as one may be after the power failed."""
    return path.is_file() and path.stat().st_size > 0


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


# ---------------------------------------------------------------- fetching


def _fetch_all(urls: Urls, manifest: Manifest, images: Path, arguments: argparse.Namespace) -> bool:
    """Fetches in rounds, since where an address has no picture the item's next one is asked for.

    Returns:
        Whether it was interrupted.
    """
    fetcher = _fetcher(arguments)
    with _stoppable(fetcher.stop), tqdm(unit="picture", ncols=100) as bar:
        while not fetcher.stop.is_set():
            wanted = manifest.wanted(urls, arguments.per_item)
            if not wanted:
                break
            bar.total = bar.n + len(wanted)
            _fetch(wanted, fetcher, manifest, images, arguments, bar)
    fetcher.close()
    return fetcher.stop.is_set()


def _fetcher(arguments: argparse.Namespace) -> Fetcher:
    try:
        from dataset_tools.net import Fetcher, Guard, parse_hosts
    except ImportError as error:
        raise UserError(
            f"Fetching needs httpx2 ({error}): `pip install 'recbole-mm[fetch]'`."
        ) from None
    guard = Guard(frozenset((*HOSTS, *parse_hosts(arguments.hosts))), arguments.allow_local)
    return Fetcher(guard, arguments.rate, arguments.tries, connections=arguments.workers)


@contextmanager
def _stoppable(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the requests under way."""
    before = {
        number: signal.signal(number, lambda *_: stop.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fetch(
    wanted: Sequence[str],
    fetcher: Fetcher,
    manifest: Manifest,
    images: Path,
    arguments: argparse.Namespace,
    bar: Any,
) -> None:
    waiting: set[Future[None]] = set()
    with ThreadPoolExecutor(arguments.workers) as pool, _stopped_by_errors(fetcher.stop):
        for url in wanted:
            if fetcher.stop.is_set():
                break
            waiting.add(pool.submit(_fetch_one, url, fetcher, manifest, images, arguments))
            if len(waiting) >= 2 * arguments.workers:  # a short queue: addresses are many
                waiting = _collect(waiting, bar)
        while waiting:
            waiting = _collect(waiting, bar)


@contextmanager
def _stopped_by_errors(stop: threading.Event) -> Iterator[None]:
    """A full disk, say, must not wait for what is still queued."""
    try:
        yield
    except BaseException:
        stop.set()
        raise


def _collect(waiting: set[Future[None]], bar: Any) -> set[Future[None]]:
    """Waits for one to end, and returns those that have not."""
    done, left = wait(waiting, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()  # raises what was not foreseen
        bar.update()
    return left


def _fetch_one(
    url: str, fetcher: Fetcher, manifest: Manifest, images: Path, arguments: argparse.Namespace
) -> None:
    """Fetches one picture and enters what became of it into the manifest at once."""
    from dataset_tools.net import FetchError, RefusedError, StoppedError, https_form

    try:
        data = fetcher.read(https_form(url), MAX_BYTES)
        data = _bounded(data, arguments.max_side, arguments.quality)
    except StoppedError:
        return
    except RefusedError as error:
        manifest.refused[url] = str(error)
    except FetchError as error:
        if error.gone:
            manifest.lost(url, str(error))
        else:
            manifest.failed[url] = str(error)
    except BadImageError as error:
        manifest.lost(url, str(error))
    else:
        manifest.fetched(url, _save(data, images))


def _save(data: bytes, images: Path) -> str:
    """Saves a picture under the hash of its content; returns its path below `images`."""
    name = f"{digest(data)[:32]}.jpg"
    target = images / name[:2] / name
    if not _has_bytes(target):
        target.parent.mkdir(exist_ok=True)
        fresh = target.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}.tmp")
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, target)
    return f"{name[:2]}/{name}"


def _bounded(data: bytes, max_side: int, quality: int) -> bytes:
    """A picture as JPEG with sides of at most `max_side` pixels, and nothing but the picture; what
    is smaller keeps its size.

    Raises:
        BadImageError: see `decode`; or it cannot be written again.
    """
    image = decode(data)
    image.info = {}  # comments and the like would be written along, and long ones never end
    out = io.BytesIO()
    try:
        image.thumbnail((max_side, max_side))
        image.save(out, "JPEG", quality=quality)
    except Exception as error:  # as in `decode`: a picture may raise almost anything
        raise BadImageError(BROKEN) from error
    return out.getvalue()


# ---------------------------------------------------------------- what it comes to


def _enter(folder: Path, urls: Urls, manifest: Manifest, per_item: int) -> list[tuple[str, str]]:
    """Writes NAME.image: what it had from elsewhere and is there, then what was fetched."""
    path = folder / f"{folder.name}.{IMAGE}"
    earlier = read_images(path) if path.is_file() else ()
    rows = [
        (item, file)
        for item, file in earlier
        if file not in manifest.made and _has_bytes(folder / "images" / file)
    ]
    rows += [
        (item, file)
        for item, candidates in urls.items()
        for file in manifest.pictures(candidates, per_item)
    ]
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_images(fresh, rows)
    os.replace(fresh, path)
    return rows


def _tell(urls: Urls, manifest: Manifest, rows: Sequence[tuple[str, str]]) -> None:
    shown = {item for item, _ in rows}
    print(f"items with addresses: {len(urls):,}, with a picture: {len(shown & set(urls)):,}")
    parts = (("for good", manifest.gone), ("", manifest.refused), ("today", manifest.failed))
    for what, reasons in parts:
        for why, count in sorted(Counter(reasons.values()).items()):
            print(f"  {' '.join(['addresses without a picture', what]).strip()}, {why}: {count:,}")
    if hosts := Counter(urlsplit(url).hostname for url in manifest.refused):
        named = ", ".join(f"{host} {count:,}" for host, count in hosts.most_common(_TOLD))
        print(f"  refused are of {len(hosts):,} hosts: {named}{' …' if len(hosts) > _TOLD else ''}")
    if manifest.failed:
        print("Run the command again later for what failed today.")
