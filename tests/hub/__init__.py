"""A hub for tests, on loopback: what `huggingface_hub` calls for models, and what can go wrong.

    with LocalHub() as hub:
        commit = hub.add("owner/name", {"model.gguf": path, "README.md": b"..."})
        hub.faults.add("model.gguf", Reset(at=100_000), times=2)
        subprocess.run([...], env=hub.environment(tmp_path / "home"))
        assert hub.sent("model.gguf") == ...

Nothing of meshd may come in: the real client is the only judge of it.
"""

from tests.hub.faults import (
    Drop,
    Fault,
    Flip,
    IgnoreRange,
    Page,
    Pointer,
    Reset,
    Slow,
    Stage,
    Stall,
    Status,
    Truncate,
    WrongLength,
)
from tests.hub.hub import LocalHub
from tests.hub.log import Request

__all__ = [
    "Drop",
    "Fault",
    "Flip",
    "IgnoreRange",
    "LocalHub",
    "Page",
    "Pointer",
    "Request",
    "Reset",
    "Slow",
    "Stage",
    "Stall",
    "Status",
    "Truncate",
    "WrongLength",
]
