"""What the tests of this room share."""

from __future__ import annotations

from typing import Any

import uvloop


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Any]:
    """The loop the daemon runs on."""
    return {"uvloop": uvloop.new_event_loop}
