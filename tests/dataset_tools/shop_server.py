"""A web server of pictures with the faults that real ones have, counting what it is asked for."""

from __future__ import annotations

import colorsys
import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

Answer = Callable[["Handler"], None]


def picture(number: int, size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    """A picture in a colour of its own."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618 % 1, 0.3 + number % 7 / 10, 0.9)
    out = io.BytesIO()
    Image.new("RGB", size, (int(255 * red), int(255 * green), int(255 * blue))).save(out, form)
    return out.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Shop

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked[self.path] += 1
        self.server.headers_seen.append(dict(self.headers.items()))
        answer = self.server.answers.get(self.path)
        time.sleep(self.server.delay_s)
        if answer is None:
            self.say(404)
        elif isinstance(answer, bytes):
            self.say(200, answer)
        else:
            answer(self)

    def say(self, status: int, body: bytes = b"", **headers: str) -> None:
        """One whole answer; names of headers with ``_`` for ``-``."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Shop(ThreadingHTTPServer):
    """The server, at any free port of this machine.

    Attributes:
        answers: bytes, or what to do, by path.
        asked: how often each path was asked for.
        headers_seen: those of each request.
        delay_s: before each answer.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, bytes | Answer] = {}
        self.asked: Counter[str] = Counter()
        self.headers_seen: list[dict[str, str]] = []
        self.delay_s = 0.0
        self.lock = threading.Lock()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # who was killed in the middle


@contextmanager
def open_shop() -> Iterator[Shop]:
    shop = Shop()
    thread = threading.Thread(target=shop.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield shop
    finally:
        shop.shutdown()
        shop.server_close()


def in_turn(answers: Sequence[Answer]) -> Answer:
    """A different answer each time; the last one stays."""
    left = list(answers)

    def answer(handler: Handler) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(handler)

    return answer


def says(status: int, body: bytes = b"", **headers: str) -> Answer:
    return lambda handler: handler.say(status, body, **headers)


def cut_off(body: bytes) -> Answer:
    """Promises all, sends half and hangs up."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.shutdown(2)

    return answer
