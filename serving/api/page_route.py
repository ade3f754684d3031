"""`GET /`: the page, one file with all that it needs."""

import asyncio
import pathlib

from starlette.requests import Request
from starlette.types import Send

from serving.api.interface import Interface, send_bytes

FILE = pathlib.Path(__file__).with_name("page") / "index.html"
_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def show(interface: Interface, request: Request, send: Send) -> None:
    """Sends the page. It reaches nothing but this server, and no other page can hold it."""
    headers = {
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    content = await asyncio.to_thread(FILE.read_bytes)
    await send_bytes(send, content, kind="text/html; charset=utf-8", headers=headers)
