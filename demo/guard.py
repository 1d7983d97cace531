"""Who may ask, and how much at once: the outermost layer of the server, in front of every page, endpoint and stream.

A page of somebody else's can make a browser send requests to a server on the same machine, or give the server's
address a name of its own (DNS rebinding). So a request must name this server in `Host`, and what a page sends must
come from a page of this server (`Origin`): by the address it listens on, a loopback name or a name that was allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import gradio as gr
from gradio import processing_utils
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
ANY = ("", "0.0.0.0", "::", "[::]")  # listening on every address of the machine
PLACE = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\s:/@\[\]]+?)\.?(?::(?P<port>\d{1,5}))?")
ORIGIN = re.compile(r"https?://(?P<place>[^/?#]+)")
FORWARDED = ("x-forwarded-host", "x-gradio-server")  # gradio takes them for its own address
UPLOAD, BODY = "/gradio_api/upload", 2**21  # bytes of any other request: prompts of a calibration, as JSON
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; frame-ancestors 'self'; base-uri 'self'; object-src 'none'"
)
HEADERS = {  # browsers load nothing from elsewhere, and give nothing elsewhere
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """ASGI middleware. host: what the server listens on; names: others it goes by; upload: bytes of one upload."""

    def __init__(self, app, host: str, names: Iterable[str] = (), upload: int = 2**23):
        self.app, self.any, self.upload = app, host in ANY, upload
        self.allowed = {_bare(name) for name in names}
        self.names = {_bare(name) for name in (host, *LOOPBACK) if name} | self.allowed

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self.refusal(headers, scope.get("server"))
        most = self.upload if scope["path"].rstrip("/").endswith(UPLOAD) else BODY
        if refusal:
            await _refuse(scope, receive, send, 403, refusal)
        elif not _within(headers.get("content-length"), most):
            await _refuse(scope, receive, send, 413, f"the request has more than {most >> 10} KiB")
        elif scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await self.app(scope, _counted(receive, most), _guarded(send))

    def refusal(self, headers: Headers, server: tuple | None) -> str | None:
        """Why a request is none of ours, in one line; None if it is. server: the address it arrived at."""
        own = self.names | ({_bare(str(server[0]))} if self.any and server else set())
        asked = headers.getlist("host")
        if len(asked) != 1 or _name(asked[0]) not in own:
            got = repr(asked[0][:80]) if asked else "no name"
            return f"this server does not go by {got}; start it with --allow-host NAME if it should"
        for name in FORWARDED:
            given = headers.get(name)
            if given is not None and _name(re.sub(r"^https?://|/.*", "", given.split(",")[0].strip())) not in own:
                return f"{name} names another server; start this one with --allow-host NAME"
        origins = headers.getlist("origin")
        if origins and not (len(origins) == 1 and self._from_here(origins[0], asked[0], own)):
            return f"a page of {origins[0][:80]} may not ask this server"
        return None

    def _from_here(self, origin: str, host: str, own: set[str]) -> bool:
        """Whether a page's address is one of this server's, on its port; an allowed name may stand for a proxy."""
        found = ORIGIN.fullmatch(origin)
        name = found and _name(found["place"])
        return name in self.allowed or (name in own and _port(found["place"]) == _port(host))


def _bare(name: str) -> str:
    """A name as it stands in a URL: small letters, IPv6 addresses in brackets."""
    name = name.lower().rstrip(".")
    return f"[{name}]" if ":" in name and not name.startswith("[") else name


def _name(place: str) -> str | None:
    """The name in NAME:PORT."""
    found = PLACE.fullmatch(place.lower())
    return found and found["name"]


def _port(place: str) -> str | None:
    found = PLACE.fullmatch(place.lower())
    return found and found["port"]


def _within(length: str | None, most: int) -> bool:
    return length is None or (length.isascii() and length.isdigit() and len(length) < 20 and int(length) <= most)


def _counted(receive, most: int):
    """`receive` that ends a request, whatever it said of its length, when more than `most` bytes of it have come."""
    size = 0

    async def counted():
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            raise HTTPException(413, f"the request has more than {most >> 10} KiB")
        return message

    return counted


def _guarded(send):
    async def guarded(message):
        if message["type"] == "http.response.start":
            more = [(name.encode(), text.encode()) for name, text in HEADERS.items()]
            message = message | {"headers": [*message.get("headers", ()), *more]}
        await send(message)

    return guarded


async def _refuse(scope, receive, send, status: int, text: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": ""})
    else:
        await PlainTextResponse(f"{text}\n", status, HEADERS)(scope, receive, send)


def fetch_nothing() -> None:
    """Keep gradio from downloading what a request names by its address, where an uploaded file is expected."""

    async def refused(url: str, cache_dir: str) -> str:
        raise gr.Error("got an address on the network, expected an uploaded file", print_exception=False)

    processing_utils.async_ssrf_protected_download = refused
