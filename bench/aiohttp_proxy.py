"""A reverse proxy as one writes it with aiohttp in an afternoon: a yardstick.

Server and ClientSession, uvloop, bodies streamed as they come.
Run as `python -m bench.aiohttp_proxy LISTEN_PORT UPSTREAM_PORT`.
"""

from __future__ import annotations

import sys

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "host"})


class Proxy:
    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self._session: ClientSession | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        body = await request.read()
        sent = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP}
        url = f"{self._upstream}{request.path_qs}"
        async with self._session.request(request.method, url, data=body, headers=sent) as answer:
            headers = {k: v for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP}
            if answer.content_length is not None:
                content = await answer.read()
                return web.Response(status=answer.status, headers=headers, body=content)
            response = web.StreamResponse(status=answer.status, headers=headers)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    async def start(self, _: web.Application) -> None:
        self._session = ClientSession(
            connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None)
        )

    async def stop(self, _: web.Application) -> None:
        if self._session is not None:
            await self._session.close()


def main() -> None:
    listen_port, upstream_port = int(sys.argv[1]), int(sys.argv[2])
    proxy = Proxy(f"http://127.0.0.1:{upstream_port}")
    app = web.Application(client_max_size=32 * 1024 * 1024)
    app.on_startup.append(proxy.start)
    app.on_cleanup.append(proxy.stop)
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    loop = uvloop.new_event_loop()
    web.run_app(app, host="127.0.0.1", port=listen_port, access_log=None, print=None, loop=loop)


if __name__ == "__main__":
    main()
