"""api: what clients talk to on :9337, and the admin socket.

May come in: parsing, access checks, routing, admission, relaying, errors in OpenAI's shape, the
read side, metrics. May not come in: what decides which model runs where, or how an engine is kept
alive; those publish a view, and this room reads it.

How a request goes: a `connection` reads it (a plain one by itself, any other through aiohttp and
`dispatch`), an `exchange` lives it, `route` and `admission` decide, `upstream` talks to the engine;
`relay` is what exchanges share.
"""

from meshd.api.server import ApiServer

__all__ = ["ApiServer"]
