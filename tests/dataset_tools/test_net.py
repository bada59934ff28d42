"""Which addresses are fetched: the guard against hostile ones, and the fetcher on a real server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from dataset_tools.net import Fetcher, FetchError, Guard, LaterError, https_form
from tests.dataset_tools.shop_server import Shop, open_shop, says

SHOP_HOSTS = frozenset(("*.media-amazon.com", "images.amazon.com"))


@pytest.fixture
def shop() -> Iterator[Shop]:
    with open_shop() as shop:
        yield shop


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Network addresses by host name, instead of the network's."""
    known: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host in known:
            return [found for a in known[host] for found in real(a, port, type=socket.SOCK_STREAM)]
        return real(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


def test_old_addresses_get_their_https_form() -> None:
    for old, new in {
        "http://ecx.images-amazon.com/images/I/4.jpg": "https://m.media-amazon.com/images/I/4.jpg",
        "HTTP://G-ecx.images-amazon.com/a": "https://m.media-amazon.com/a",
        "http://images.amazon.com/a?b=c://d": "https://images.amazon.com/a?b=c://d",
        "https://m.media-amazon.com/a": "https://m.media-amazon.com/a",
        "http://127.0.0.1:8000/a": "http://127.0.0.1:8000/a",
        "http://localhost/a": "http://localhost/a",
        "ftp://x/a": "ftp://x/a",
        "nothing": "nothing",
    }.items():
        assert https_form(old) == new


HOSTILE = [
    "file:///etc/passwd",
    "ftp://m.media-amazon.com/a",
    "http://m.media-amazon.com/a",
    "https://m.media-amazon.com:8443/a",
    "https://127.0.0.1/a",
    "https://[::1]/a",
    "https://0x7f.1/a",
    "https://2130706433/a",
    "https://localhost/a",
    "https://169.254.169.254/latest/meta-data",
    "https://user@m.media-amazon.com/a",
    "https://user:word@m.media-amazon.com/a",
    "https://evil.com/m.media-amazon.com",
    "https://m.media-amazon.com.evil.com/a",
    "https://evilmedia-amazon.com/a",
    "https://media-amazon.com/a",
    "https://m.media-amazon.com@evil.com/a",
    "https://evil.com#@m.media-amazon.com/",
    "https://evil.com\\@m.media-amazon.com/",
    "//m.media-amazon.com/a",
    "https:///a",
    "",
]


@pytest.mark.parametrize("url", HOSTILE)
def test_hostile_addresses_are_refused(url: str, named: dict[str, list[str]]) -> None:
    named["m.media-amazon.com"] = ["93.184.216.34"]
    with pytest.raises(FetchError, match="refused"):
        Fetcher(Guard(SHOP_HOSTS), tries=1).read(url, 100)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "fe80::1", "fd00::1", "::"),
        *("::ffff:127.0.0.1", "2002:7f00:1::", "ff02::1", "fec0::1", "::7f00:1", "::ffff:0:7f00:1"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "2a00::5efe:a00:1"),
    ],
)
def test_a_known_name_in_a_private_network_is_refused(
    address: str, named: dict[str, list[str]]
) -> None:
    url = httpx2.URL("https://m.media-amazon.com/a")
    named["m.media-amazon.com"] = ["93.184.216.34", address]  # one of several is enough
    with pytest.raises(FetchError, match="lies in a private network"):
        Guard(SHOP_HOSTS).addresses(url)
    named["m.media-amazon.com"] = ["93.184.216.34"]
    assert Guard(SHOP_HOSTS).addresses(url) == ["93.184.216.34"]


def test_what_was_checked_is_what_is_connected_to(
    shop: Shop, named: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that changes its address between check and connection gains nothing."""
    shop.answers = {"/a": b"secret"}
    lookups = iter([["93.184.216.34"], ["127.0.0.1"], ["127.0.0.1"]])
    connected: list[str] = []
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, port, **_: [(2, 1, 6, "", (a, port)) for a in next(lookups)],
    )

    def connect(address: tuple[str, int], *_: Any, **__: Any) -> Any:
        connected.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(FetchError, match="network"):
        Fetcher(Guard(SHOP_HOSTS), tries=1).read("https://m.media-amazon.com/a", 100)
    assert connected == ["93.184.216.34"]


def test_redirects_are_checked_each(shop: Shop) -> None:
    shop.answers = {
        "/out": says(302, Location="https://evil.com/a"),
        "/file": says(302, Location="file:///etc/passwd"),
        "/private": says(302, Location="http://10.0.0.1/a"),
        "/near": says(302, Location="/a"),
        "/loop": says(302, Location="/loop"),
        "/a": b"content",
    }
    fetcher = Fetcher(Guard(frozenset(), allow_local=True), tries=1)
    assert fetcher.read(shop.url("/near"), 100) == b"content"
    for path in ("/out", "/file", "/private", "/loop"):
        with pytest.raises(FetchError, match="refused"):
            fetcher.read(shop.url(path), 100)
    assert shop.asked["/loop"] == 4  # itself and three redirects


def test_a_flag_lets_this_machine_be_asked_and_no_other(shop: Shop) -> None:
    shop.answers = {"/a": b"content"}
    with pytest.raises(FetchError, match="no known host"):
        Fetcher(Guard(frozenset()), tries=1).read(shop.url("/a"), 100)
    assert Fetcher(Guard(frozenset(), True)).read(shop.url("/a"), 100) == b"content"
    with pytest.raises(FetchError, match="no known host"):
        Fetcher(Guard(frozenset(), True), tries=1).read("http://10.0.0.1/a", 100)


def test_packed_answers_are_not_unpacked(shop: Shop) -> None:
    shop.answers = {"/a": says(200, b"\x1f\x8b bomb", Content_Encoding="gzip")}
    with pytest.raises(FetchError, match="packed"):
        Fetcher(Guard(frozenset(), True), tries=1).read(shop.url("/a"), 100)
    assert shop.headers_seen[0]["Accept-Encoding"] == "identity"


def test_too_long_a_wait_is_left_to_the_next_run(shop: Shop) -> None:
    shop.answers = {"/a": says(429, Retry_After="4000")}
    with pytest.raises(LaterError, match="status 429"):
        Fetcher(Guard(frozenset(), True), tries=4).read(shop.url("/a"), 100)
    assert shop.asked["/a"] == 1


def test_a_wait_may_be_a_date(shop: Shop) -> None:
    shop.answers = {"/a": says(503, Retry_After="Fri, 31 Dec 1999 23:59:59 GMT")}
    with pytest.raises(LaterError) as caught:
        Fetcher(Guard(frozenset(), True), tries=1).read(shop.url("/a"), 100)
    assert caught.value.wait_s == 0


def test_requests_keep_the_rate_over_all_threads(shop: Shop) -> None:
    shop.answers = {"/a": b"x"}
    fetcher = Fetcher(Guard(frozenset(), True), rate=50)
    started = time.monotonic()
    threads = [threading.Thread(target=fetcher.read, args=(shop.url("/a"), 10)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started >= 15 / 50
    assert shop.asked["/a"] == 16


def test_a_stopped_fetcher_asks_nothing(shop: Shop) -> None:
    fetcher = Fetcher(Guard(frozenset(), True), rate=1)
    fetcher.stop.set()
    with pytest.raises(FetchError, match="stopped"):
        fetcher.read(shop.url("/a"), 10)
    assert not shop.asked
