"""The network, with care: https from hosts that are known, never from a network of one's own."""

from __future__ import annotations

import email.utils
import ipaddress
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import httpx2

Headers = Mapping[str, str]
_T = TypeVar("_T")
_IP = ipaddress.IPv4Address | ipaddress.IPv6Address
UNKNOWN = "refused: no known host (see --hosts)"
# IPv6 networks whose last 32 bits are an IPv4 address (compatible, translated, NAT64), the mark of
# ISATAP before such an address, and networks that are never on the internet.
_CARRIERS = tuple(map(ipaddress.IPv6Network, ("::/96", "::ffff:0:0:0/96", "64:ff9b::/96")))
_ISATAP = 0x5EFE << 32
_NEVER = tuple(map(ipaddress.IPv6Network, ("64:ff9b:1::/48", "fec0::/10")))
_REDIRECTS = 3
_LONGEST_WAIT = 300.0  # seconds; who asks for more is asked again by the next run
_GONE = (404, 410)
_LATER = (408, 425, 429)  # and all of 500 and above
# Hosts of old addresses that know no https, and where their files are now.
_MOVED = {
    "ecx.images-amazon.com": "m.media-amazon.com",
    "g-ecx.images-amazon.com": "m.media-amazon.com",
}


class FetchError(Exception):
    """An address cannot be fetched; the message is the reason.

    Args:
        why: the reason.
        gone: whether it never can be, so that nobody need ask again.
        status: of the answer, where there was one.
    """

    def __init__(self, why: str, gone: bool = False, status: int | None = None) -> None:
        super().__init__(why)
        self.gone, self.status = gone, status


class RefusedError(FetchError):
    """Not asked for, or not given to us: neither gone nor to be asked again."""


class StoppedError(FetchError):
    """The fetcher was stopped before it asked."""


class LaterError(FetchError):
    """What another try may mend.

    Args:
        why: the reason.
        wait_s: seconds the source asks to wait; None: it does not say.
    """

    def __init__(self, why: str, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.wait_s = wait_s


def https_form(url: str) -> str:
    """An `http` address as `https`, at the host where an old one's files are now."""
    begin, between, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    if not between or begin.lower() not in ("http", "https"):
        return url
    if ":" in host or _names_this_machine(host):
        return url
    moved = _MOVED.get(host.lower(), host)
    return f"https://{moved}{slash}{path}"


@dataclass(frozen=True)
class Guard:
    """Which addresses may be fetched.

    Attributes:
        hosts: their names; `*.name` is every host below that one.
        allow_local: whether hosts may lie in a private network, and this machine may be asked, by
            http and at any port too.
    """

    hosts: frozenset[str]
    allow_local: bool = False

    def knows(self, host: str) -> bool:
        """Whether a host is on the list."""
        parents = (f"*.{host.split('.', cut)[cut]}" for cut in range(1, host.count(".") + 1))
        return host in self.hosts or any(parent in self.hosts for parent in parents)

    def check(self, url: httpx2.URL) -> None:
        """Looks at the address alone.

        Raises:
            RefusedError: it may not be fetched.
        """
        is_own = self.allow_local and _names_this_machine(url.host)
        if url.userinfo or not (self.knows(url.host) or is_own):
            raise RefusedError(UNKNOWN)
        if not is_own and (url.scheme != "https" or url.port not in (None, 443)):
            raise RefusedError("refused: no https address, or with a port")
        if is_own and url.scheme not in ("http", "https"):
            raise RefusedError("refused: neither http nor https")

    def addresses(self, url: httpx2.URL) -> list[str]:
        """The network addresses of an address that may be fetched.

        Raises:
            RefusedError: it may not be.
            LaterError: its host is not found.
        """
        self.check(url)
        found = _resolved(url.host, url.port or 443)
        if not self.allow_local and not all(map(_is_public, found)):
            raise RefusedError("refused: the host lies in a private network")
        return [str(address) for address in found]


def _names_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _resolved(host: str, port: int) -> list[_IP]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise LaterError(f"host not found ({error})") from None
    return [ipaddress.ip_address(str(place[0]).partition("%")[0]) for *_, place in found]


def _is_public(address: _IP) -> bool:
    """Whether an address is on the internet; one that carries another inside is as that one."""
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in network for network in _NEVER):
            return False
        inside = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if any(address in network for network in _CARRIERS) or int(address) & _ISATAP == _ISATAP:
            inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inside is not None:
            return _is_public(inside)
    return address.is_global and not address.is_multicast


class _Guarded(httpx2.BaseTransport):
    """Asks the guard before every request, redirects among them, and connects to what it allowed.

    The name is looked up once: what was checked is what is connected to. Each host has connections
    of its own, since the certificate was asked for by name.
    """

    def __init__(self, guard: Guard, connections: int) -> None:
        self._guard = guard
        self._limits = httpx2.Limits(max_connections=connections)
        self._context = httpx2.create_ssl_context()
        self._hosts: dict[str, httpx2.HTTPTransport] = {}
        self._lock = threading.Lock()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        host = request.url.host
        address = random.choice(self._guard.addresses(request.url))
        request = httpx2.Request(
            request.method,
            request.url.copy_with(host=address),
            headers=request.headers,  # `Host` is the name
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": host},
        )
        return self._transport(host).handle_request(request)

    def _transport(self, host: str) -> httpx2.HTTPTransport:
        with self._lock:
            if host not in self._hosts:
                self._hosts[host] = httpx2.HTTPTransport(
                    verify=self._context, trust_env=False, limits=self._limits
                )
            return self._hosts[host]

    def close(self) -> None:
        for transport in self._hosts.values():
            transport.close()


class Fetcher:
    """Fetches addresses that a guard allows: paced, tried again, bounded. Safe between threads.

    Args:
        guard: which addresses.
        rate: requests a second at most; 0: any number.
        tries: of one address.
        timeout_s: seconds without a byte after which a try has failed.
        connections: at once to one host.

    Attributes:
        stop: once set nothing is waited for or begun any more.
    """

    def __init__(
        self,
        guard: Guard,
        rate: float = 0.0,
        tries: int = 4,
        timeout_s: float = 20.0,
        connections: int = 8,
    ) -> None:
        self.stop = threading.Event()
        self._tries, self._timeout_s = tries, timeout_s
        self._gap = 1 / rate if rate else 0.0
        self._next, self._lock = 0.0, threading.Lock()
        self._guard = guard
        self._client = httpx2.Client(
            transport=_Guarded(guard, connections),
            timeout=timeout_s,
            follow_redirects=True,
            max_redirects=_REDIRECTS,
            trust_env=False,
            # As they are: what is packed for the way could unpack to anything.
            headers={"User-Agent": "recbole-mm", "Accept-Encoding": "identity"},
        )

    def close(self) -> None:
        """Ends all connections."""
        self._client.close()

    def read(self, url: str, most: int) -> bytes:
        """The bytes behind an address.

        Args:
            url: the address.
            most: bytes allowed.

        Raises:
            FetchError: refused, gone, too large, or failed as often as it was tried.
        """
        return self.tried(lambda: self._read_once(url, most))

    def _read_once(self, url: str, most: int) -> bytes:
        data = bytearray()
        with self.opened(url) as response:
            for part in self.parts(response, 6 * self._timeout_s):
                data += part
                if len(data) > most:
                    raise FetchError(f"more than {most:,} bytes", gone=True)
        return bytes(data)

    def tried(self, attempt: Callable[[], _T]) -> _T:
        """What `attempt` gives, tried again with longer and longer pauses.

        Raises:
            FetchError: what it raises, or what its last try did.
        """
        for number in range(1, self._tries + 1):
            try:
                return attempt()
            except LaterError as error:
                wait = error.wait_s
                if number == self._tries or (wait or 0) > _LONGEST_WAIT:
                    raise
                if wait is not None:
                    self._pause_all(wait)
                self.stop.wait(max(wait or 0, random.uniform(0.5, 1) * 2 ** (number - 1)))
        raise AssertionError("at least one try")

    @contextmanager
    def opened(self, url: str, headers: Headers | None = None) -> Iterator[httpx2.Response]:
        """The answer to one request, its body not yet read.

        Raises:
            RefusedError: by the guard, or by the source.
            FetchError: gone.
            LaterError: of the network or of the source, for now.
        """
        try:
            self._guard.check(httpx2.URL(url))  # what is refused takes no turn
            self._take_turn()
            with self._client.stream("GET", url, headers=headers) as response:
                _check(response)
                yield response
        except httpx2.InvalidURL as error:
            raise RefusedError(f"refused: no address ({error})") from None
        except (httpx2.UnsupportedProtocol, httpx2.TooManyRedirects) as error:
            raise RefusedError(f"refused: {error}") from None
        except httpx2.TransportError as error:
            raise LaterError(f"network ({type(error).__name__})") from None

    def parts(self, response: httpx2.Response, within_s: float | None = None) -> Iterator[bytes]:
        """The body as it comes.

        Args:
            response: of `opened`.
            within_s: seconds for all of it.

        Raises:
            LaterError: it took too long, or the fetcher was stopped.
        """
        ends = time.monotonic() + (within_s or float("inf"))
        for part in response.iter_raw():
            yield part
            if time.monotonic() > ends:
                raise LaterError(f"not whole after {within_s:.0f} s")

    def _take_turn(self) -> None:
        with self._lock:
            at = max(self._next, time.monotonic())
            self._next = at + self._gap
        if self.stop.wait(max(0.0, at - time.monotonic())):
            raise StoppedError("stopped")

    def _pause_all(self, seconds: float) -> None:
        """Nothing is asked for before: who limits one request limits them all."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _check(response: httpx2.Response) -> None:
    status = response.status_code
    if status in (200, 206) and response.headers.get("Content-Encoding", "identity") == "identity":
        return
    why = f"status {status}" if status not in (200, 206) else "packed though nobody asked"
    if status in _LATER or status >= 500:
        raise LaterError(why, _retry_after(response.headers.get("Retry-After", "")))
    if status in _GONE:
        raise FetchError(why, gone=True, status=status)
    raise RefusedError(f"refused: {why}", status=status)


def _retry_after(value: str) -> float | None:
    """Seconds of a `Retry-After`, which has a number or a date."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def parse_hosts(text: str) -> Iterable[str]:
    """Hosts of a flag, separated by commas."""
    return filter(None, (word.strip().lower() for word in text.split(",")))
