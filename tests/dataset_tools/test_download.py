"""Downloads from a real server on this machine: whole, resumed, changed meanwhile or refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dataset_tools import download
from dataset_tools.download import Remote, obtain, unpack
from recbole_mm.errors import UserError
from tests.dataset_tools.shop_server import Handler, Shop, open_shop, says

ROOT = Path(__file__).resolve().parents[2]
DATA = bytes(range(256)) * 4000
REMOTE = Remote("https://files.grouplens.org/data/some.zip", "https://grouplens.org/")


@pytest.fixture
def shop() -> Iterator[Shop]:
    with open_shop() as shop:
        yield shop


def whole_range(start: int, size: int = len(DATA)) -> str:
    return f"bytes {start}-{size - 1}/{size}"


def begun(shop: Shop, folder: Path, data: bytes, size: int | None = len(DATA)) -> Path:
    """What a kill leaves of `some.zip`."""
    about = {"url": shop.url("/some.zip"), "tag": '"one"', "size": size}
    (folder / "some.zip.part.json").write_text(json.dumps(about))
    (folder / "some.zip.part").write_bytes(data)
    return folder / "some.zip.part"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries are short."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.001)


class File:
    """A file as servers with resume give it; hangs up after so many bytes of each answer."""

    def __init__(self, data: bytes, tag: str = '"one"', at_once: int | None = None) -> None:
        self.data, self.tag, self.at_once = data, tag, at_once
        self.sent = 0
        self.pause_s = 0.0

    def __call__(self, handler: Handler) -> None:
        ranged, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        start = 0
        if ranged and condition == self.tag:
            start = int(ranged.removeprefix("bytes=").removesuffix("-"))
            handler.send_response(206)
            end = len(self.data) - 1
            handler.send_header("Content-Range", f"bytes {start}-{end}/{len(self.data)}")
        else:
            handler.send_response(200)
        handler.send_header("ETag", self.tag)
        handler.send_header("Content-Length", str(len(self.data) - start))
        handler.end_headers()
        stop = len(self.data) if self.at_once is None else start + self.at_once
        for at in range(start, min(stop, len(self.data)), 8192):
            part = self.data[at : min(at + 8192, stop)]
            handler.wfile.write(part)
            self.sent += len(part)
            time.sleep(self.pause_s)
        if stop < len(self.data):
            handler.close_connection = True
            handler.connection.shutdown(2)


def test_a_file_comes_whole_under_its_name(shop: Shop, tmp_path: Path) -> None:
    shop.answers["/some.zip"] = File(DATA)
    path = obtain(tmp_path / "raw", REMOTE, shop.url(""))
    assert path == tmp_path / "raw" / "some.zip"
    assert path.read_bytes() == DATA
    assert sorted(file.name for file in path.parent.iterdir()) == ["some.zip"]


def test_a_line_that_breaks_again_and_again_is_gone_on_with(shop: Shop, tmp_path: Path) -> None:
    file = shop.answers["/some.zip"] = File(DATA, at_once=300_000)
    assert obtain(tmp_path, REMOTE, shop.url("/")).read_bytes() == DATA
    assert isinstance(file, File)
    assert file.sent == len(DATA)  # no byte twice
    assert shop.asked["/some.zip"] == 4


def test_a_file_that_changed_meanwhile_is_begun_anew(shop: Shop, tmp_path: Path) -> None:
    shop.answers["/some.zip"] = File(b"old" * 9999, '"old"')
    (tmp_path / "some.zip.part").write_bytes(b"old" * 10)
    about = {"url": shop.url("/some.zip"), "tag": '"old"', "size": 29997}
    (tmp_path / "some.zip.part.json").write_text(json.dumps(about))
    shop.answers["/some.zip"] = File(DATA, '"new"')
    assert obtain(tmp_path, REMOTE, shop.url("")).read_bytes() == DATA


@pytest.mark.parametrize(
    "about",
    ["", "[]", "{", '{"url": "https://other/some.zip", "tag": "\\"one\\"", "size": 1024000}'],
)
def test_what_belongs_to_another_file_is_not_gone_on_with(
    shop: Shop, tmp_path: Path, about: str
) -> None:
    shop.answers["/some.zip"] = File(DATA)
    (tmp_path / "some.zip.part").write_bytes(b"x" * 1000)
    (tmp_path / "some.zip.part.json").write_text(about)
    assert obtain(tmp_path, REMOTE, shop.url("")).read_bytes() == DATA


def test_without_a_tag_nothing_is_glued_together(shop: Shop, tmp_path: Path) -> None:
    shop.answers["/some.zip"] = File(DATA, tag="")
    (tmp_path / "some.zip.part").write_bytes(DATA[:5000])
    about = {"url": shop.url("/some.zip"), "tag": "", "size": len(DATA)}
    (tmp_path / "some.zip.part.json").write_text(json.dumps(about))
    assert obtain(tmp_path, REMOTE, shop.url("")).read_bytes() == DATA
    assert "Range" not in shop.headers_seen[0]


def test_a_weak_tag_gives_way_to_the_date(shop: Shop, tmp_path: Path) -> None:
    def answer(handler: Handler) -> None:
        shop.asked["ranged"] += "Range" in handler.headers
        date = "Wed, 01 Jan 2014 00:00:00 GMT"
        if handler.headers.get("If-Range") == date:
            start = int(handler.headers["Range"][6:-1])
            said = {"Last_Modified": date, "Content_Range": whole_range(start)}
            handler.say(206, DATA[start:], **said)
            return
        handler.send_response(200)
        handler.send_header("ETag", 'W/"x"')
        handler.send_header("Last-Modified", date)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.end_headers()
        handler.wfile.write(DATA[:70_000])
        handler.close_connection = True
        handler.connection.shutdown(2)

    shop.answers["/some.zip"] = answer
    assert obtain(tmp_path, REMOTE, shop.url("")).read_bytes() == DATA
    assert shop.asked["ranged"] == 1


def test_killed_it_goes_on_where_it_was(shop: Shop, tmp_path: Path) -> None:
    file = File(DATA)
    file.pause_s = 0.02
    shop.answers["/some.zip"] = file
    code = (
        "import sys; from pathlib import Path; from dataset_tools.download import Remote, obtain; "
        f"obtain(Path(sys.argv[1]), Remote({REMOTE.url!r}, {REMOTE.page!r}), sys.argv[2])"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), shop.url("")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    part = tmp_path / "some.zip.part"
    while not part.is_file() or part.stat().st_size < 200_000:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    there = part.stat().st_size
    file.pause_s = 0
    time.sleep(0.2)  # the server notices
    sent = file.sent
    assert obtain(tmp_path, REMOTE, shop.url("")).read_bytes() == DATA
    assert file.sent - sent <= len(DATA) - there + 8192


@pytest.mark.usefixtures("hasty")
def test_answers_without_a_byte_come_to_an_end(shop: Shop, tmp_path: Path) -> None:
    part = begun(shop, tmp_path, DATA[:5000])
    asked = shop.asked

    def answer(handler: Handler) -> None:
        assert asked["/some.zip"] < 50
        handler.say(206, ETag='"one"', Content_Range=whole_range(5000))

    shop.answers["/some.zip"] = answer
    with pytest.raises(UserError, match="nothing more comes"):
        obtain(tmp_path, REMOTE, shop.url(""))
    assert asked["/some.zip"] == 4
    assert part.read_bytes() == DATA[:5000]


@pytest.mark.parametrize(
    "said",
    [
        {"Content_Range": whole_range(0)},
        {"Content_Range": whole_range(4000)},
        {"Content_Range": whole_range(5000, len(DATA) + 7)},
        {"Content_Range": f"bytes 5000-{len(DATA) - 1}/*"},
        {"Content_Range": whole_range(5000), "ETag": '"two"'},
        {},
    ],
)
@pytest.mark.usefixtures("hasty")
def test_what_is_not_the_rest_is_never_glued_on(
    shop: Shop, tmp_path: Path, said: dict[str, str]
) -> None:
    begun(shop, tmp_path, DATA[:5000])

    def answer(handler: Handler) -> None:
        if "Range" in handler.headers:
            handler.say(206, b"x" * (len(DATA) - 5000), **{"ETag": '"one"', **said})
        else:
            handler.say(200, DATA, ETag='"two"')

    shop.answers["/some.zip"] = answer
    assert obtain(tmp_path, REMOTE, shop.url("")).read_bytes() == DATA


@pytest.mark.usefixtures("hasty")
def test_a_rest_that_is_too_long_is_not_taken(shop: Shop, tmp_path: Path) -> None:
    begun(shop, tmp_path, DATA[:5000])

    def answer(handler: Handler) -> None:
        if "Range" in handler.headers:
            said = {"ETag": '"one"', "Content_Range": whole_range(5000)}
            handler.say(206, DATA[5000:] + b"more", **said)
        else:
            handler.say(200, DATA, ETag='"one"')

    shop.answers["/some.zip"] = answer
    assert obtain(tmp_path, REMOTE, shop.url("")).read_bytes() == DATA


@pytest.mark.usefixtures("hasty")
def test_a_size_that_nobody_said_is_learnt_with_the_rest(shop: Shop, tmp_path: Path) -> None:
    """Answers of 300,000 bytes that end as they should are no whole file."""
    begun(shop, tmp_path, DATA[:5000], None)

    def answer(handler: Handler) -> None:
        start = int(handler.headers["Range"][6:-1])
        data = DATA[start : start + 300_000]
        place = f"bytes {start}-{start + len(data) - 1}/{len(DATA)}"
        handler.say(206, data, ETag='"one"', Content_Range=place)

    shop.answers["/some.zip"] = answer
    assert obtain(tmp_path, REMOTE, shop.url("")).read_bytes() == DATA
    assert shop.asked["/some.zip"] == 4


@pytest.mark.usefixtures("hasty")
def test_a_part_without_a_rest_is_begun_anew(shop: Shop, tmp_path: Path) -> None:
    """All of it was there when it was killed, and nobody had said how much that is."""
    begun(shop, tmp_path, DATA, None)

    def answer(handler: Handler) -> None:
        if "Range" in handler.headers:
            handler.say(416, ETag='"one"', Content_Range=f"bytes */{len(DATA)}")
        else:
            handler.say(200, DATA, ETag='"one"')

    shop.answers["/some.zip"] = answer
    assert obtain(tmp_path, REMOTE, shop.url("")).read_bytes() == DATA
    assert [file.name for file in tmp_path.iterdir()] == ["some.zip"]


def test_two_commands_do_not_write_one_file(shop: Shop, tmp_path: Path) -> None:
    file = File(DATA)
    file.pause_s = 0.01
    shop.answers["/some.zip"] = file
    with ThreadPoolExecutor() as pool:
        first = pool.submit(obtain, tmp_path, REMOTE, shop.url(""))
        while not (tmp_path / "some.zip.part").is_file():
            time.sleep(0.01)
        with pytest.raises(UserError, match=r"Another command is downloading .*some\.zip"):
            obtain(tmp_path, REMOTE, shop.url(""))
        assert first.result().read_bytes() == DATA
    assert obtain(tmp_path, REMOTE, shop.url("")).read_bytes() == DATA
    assert shop.asked["/some.zip"] == 1  # who comes after finds it there
    assert [file.name for file in tmp_path.iterdir()] == ["some.zip"]


def test_the_published_checksum_is_compared(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote = Remote(REMOTE.url, REMOTE.page, f"{REMOTE.url}.md5")
    shop.answers["/some.zip"] = File(DATA)
    digest = hashlib.md5(DATA).hexdigest()
    shop.answers["/some.zip.md5"] = f"MD5 (some.zip) = {digest.upper()}\n".encode()
    assert obtain(tmp_path / "good", remote, shop.url("")).read_bytes() == DATA
    shop.answers["/some.zip.md5"] = f"{'0' * 32}  some.zip".encode()
    with pytest.raises(UserError, match="checksum is not the one"):
        obtain(tmp_path / "bad", remote, shop.url(""))
    assert list((tmp_path / "bad").iterdir()) == []
    shop.answers["/some.zip.md5"] = b"<html>"
    with pytest.raises(UserError, match="no checksum in"):
        obtain(tmp_path / "none", remote, shop.url(""))


@pytest.mark.parametrize("status", [404, 410])
def test_a_checksum_that_nobody_publishes_stops_nothing(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    remote = Remote(REMOTE.url, REMOTE.page, f"{REMOTE.url}.md5")
    shop.answers = {"/some.zip": File(DATA), "/some.zip.md5": says(status)}
    assert obtain(tmp_path, remote, shop.url("")).read_bytes() == DATA
    assert "No checksum is published at http://127.0.0.1" in capsys.readouterr().out


@pytest.mark.usefixtures("hasty")
def test_a_checksum_that_fails_is_named_and_the_file_stays(shop: Shop, tmp_path: Path) -> None:
    remote = Remote(REMOTE.url, REMOTE.page, f"{REMOTE.url}.md5")
    shop.answers["/some.zip"] = File(DATA)
    for answer in (says(500), says(403), says(200, b" " * 10_001)):
        shop.answers["/some.zip.md5"] = answer
        with pytest.raises(UserError, match=r"checksum http\S+/some\.zip\.md5 cannot be read"):
            obtain(tmp_path, remote, shop.url(""))
        assert (tmp_path / "some.zip.part").read_bytes() == DATA
    shop.answers["/some.zip.md5"] = hashlib.md5(DATA).hexdigest().encode()
    assert obtain(tmp_path, remote, shop.url("")).read_bytes() == DATA
    assert shop.asked["/some.zip"] == 1


def resolves(patch: pytest.MonkeyPatch, *answers: str) -> None:
    """Every name has these addresses, one after the other; the last one stays."""
    left = list(answers)

    def found(host: str, port: int, **more: object) -> list[Any]:
        if not left[0]:
            raise OSError("unknown")
        return [(2, 1, 6, "", (left.pop(0) if len(left) > 1 else left[0], port))]

    patch.setattr(socket, "getaddrinfo", found)


@pytest.mark.parametrize(
    ("address", "is_local"),
    [("127.0.0.1", True), ("10.0.0.7", True), ("::1", True), ("8.8.8.8", False), ("", False)],
)
def test_a_mirror_is_local_where_its_host_is(
    monkeypatch: pytest.MonkeyPatch, address: str, is_local: bool
) -> None:
    resolves(monkeypatch, address)
    for place in (
        "mirror.example",
        "MIRROR.example:8080",
        "m%69rror.example",
        "me@b\xfccher.example",
    ):
        assert download._is_local(f"https://{place}/some.zip") == is_local
    for broken in ("mirror/some.zip", "https:///some.zip", "https://a:b/some.zip"):
        assert not download._is_local(broken)


@pytest.mark.usefixtures("hasty")
def test_a_public_mirror_leads_into_no_private_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolves(monkeypatch, "8.8.8.8", "127.0.0.1")
    with pytest.raises(UserError, match=r"mirror\.example.* the host lies in a private network"):
        obtain(tmp_path, REMOTE, "https://mirror.example/")


def test_what_cannot_be_had_is_one_sentence(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"some\.zip is not there, .* status 404.*grouplens"):
        obtain(tmp_path, REMOTE, shop.url(""))
    shop.answers["/some.zip"] = says(302, Location="https://evil.com/some.zip")
    with pytest.raises(UserError, match="no known host"):
        obtain(tmp_path, REMOTE, shop.url(""))


def test_a_full_disk_is_told_before(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.answers["/some.zip"] = File(DATA)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="takes 1,024,000 bytes and 1,000 are free"):
        obtain(tmp_path, REMOTE, shop.url(""))


# ---------------------------------------------------------------- archives


def packed(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_files_are_unpacked_flat_and_nowhere_else(tmp_path: Path) -> None:
    members = {
        "ml-1m/": b"",
        "ml-1m/ratings.dat": b"1::2",
        "../../out.dat": b"out",
        "/etc/abs.dat": b"abs",
        "ml-1m/.hidden.dat": b"",
        "C:\\evil.dat": b"",
        "ml-1m/notes.txt": b"",
    }
    archive = packed(tmp_path / "a.zip", members)
    folder = tmp_path / "deep" / "raw"
    unpack(archive, folder, lambda name: name.endswith(".dat"), 100)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.dat")}
    names = ("ratings.dat", "out.dat", "abs.dat")
    assert found >= {f"deep/raw/{name}" for name in names}
    assert all(path.startswith("deep/raw/") for path in found)
    assert (folder / "ratings.dat").read_bytes() == b"1::2"


def test_a_bomb_in_an_archive_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = packed(tmp_path / "a.zip", {"bomb": b"\0" * 10_000_000, "fine": b"1"})
    unpack(archive, tmp_path / "raw", lambda name: True, 1_000_000)
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["fine"]
    assert capsys.readouterr().out == "a.zip: files left out, larger than 1,000,000 bytes: 1\n"
    unpack(archive, tmp_path / "raw", lambda name: name == "fine", 1_000_000)
    assert capsys.readouterr().out == ""


def test_a_broken_archive_is_one_sentence(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a", b"content that is changed")
    (tmp_path / "cut.zip").write_bytes(out.getvalue()[:-20])
    changed = out.getvalue().replace(b"content", b"kontent", 1)
    (tmp_path / "changed.zip").write_bytes(changed)
    for name in ("cut.zip", "changed.zip"):
        with pytest.raises(
            UserError, match=rf"{name} cannot be unpacked .*delete .*{name} and give"
        ):
            unpack(tmp_path / name, tmp_path / "raw", lambda name: True, 100)


def test_what_is_no_deflated_data_or_wants_a_password_is_one_sentence(tmp_path: Path) -> None:
    whole = packed(tmp_path / "a.zip", {"a": bytes(range(256)) * 9}).read_bytes()
    garbage = whole[:31] + b"\xff" * 20 + whole[51:]  # after a header of 30 bytes and the name
    central = whole.index(b"PK\1\2")
    secret = bytearray(whole)
    secret[6] |= 1
    secret[central + 8] |= 1
    for data in (garbage, secret):
        (tmp_path / "a.zip").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.zip cannot be unpacked"):
            unpack(tmp_path / "a.zip", tmp_path / "raw", lambda name: True, 10_000)
