"""The admin socket's orders for the mesh: bodies, bounds, and who carries them out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from meshd.api.admin import AdminServer, InviteBody, LoadBody, UnloadBody
from meshd.errors import ModelNotFound, NotFound
from meshd.ids import ModelId
from meshd.kernel import FlightRecorder
from meshd.view import Role


class Controls:
    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def invite(self, body: InviteBody) -> dict[str, Any]:
        self.asked.append(body)
        return {"token": "t", "expires_at": 1, "command": "c"}

    async def revoke(self, node: str) -> dict[str, Any]:
        self.asked.append(node)
        if node == "nobody":
            raise NotFound("no node is called 'nobody'")
        return {"node": node, "id": "x"}

    async def leave(self) -> dict[str, Any]:
        self.asked.append("leave")
        return {"mesh": "home"}

    async def drain(self) -> dict[str, Any]:
        self.asked.append("drain")
        return {"state": "draining"}

    async def undrain(self) -> dict[str, Any]:
        self.asked.append("undrain")
        return {"state": "ready"}


class Admin:
    """A running server, and how to ask it."""

    def __init__(self, path: Path, controls: Controls | None) -> None:
        self._path = path
        self.orders: list[LoadBody | UnloadBody | str] = []
        """To load, to unload, to plan."""
        self.server = AdminServer(
            path,
            load=self._load,
            unload=self._unload,
            status=dict,
            recorder=FlightRecorder(),
            mesh=controls,
            plan=self._plan,
        )

    async def _load(self, body: LoadBody) -> ModelId:
        self.orders.append(body)
        return ModelId("named")

    async def _unload(self, body: UnloadBody) -> ModelId:
        self.orders.append(body)
        return ModelId(body.model)

    async def _plan(self, ref: str) -> dict[str, Any]:
        self.orders.append(ref)
        if ref == "nothing":
            raise ModelNotFound("`nothing` is not known")
        return {"model": ref, "nodes": []}

    async def exchange(self, path: str, body: bytes | None) -> tuple[int, Any]:
        """Status and JSON of the answer to a POST, with no Content-Length if there is no body."""
        reader, writer = await asyncio.open_unix_connection(self._path)
        length = "" if body is None else f"Content-Length: {len(body)}\r\n"
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{length}\r\n"
        writer.write(head.encode() + (body or b""))
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        first, _, rest = answer.partition(b"\r\n")
        return int(first.split()[1]), json.loads(rest.partition(b"\r\n\r\n")[2])

    async def post(self, path: str, body: Any) -> Any:
        status, value = await self.exchange(path, json.dumps(body).encode())
        assert status == 200, value
        return value

    async def refused(self, path: str, body: Any) -> tuple[int, str, str]:
        status, value = await self.exchange(path, json.dumps(body).encode())
        return status, value["error"]["code"], value["error"]["message"]


@pytest.fixture
def controls() -> Controls | None:
    return Controls()


@pytest.fixture
async def admin(tmp_path: Path, controls: Controls | None) -> AsyncIterator[Admin]:
    made = Admin(tmp_path / "admin.sock", controls)
    task = asyncio.create_task(made.server.run())
    await made.server.ready.wait()
    yield made
    made.server.stopping.set()
    await task


async def test_orders_reach_the_mesh(admin: Admin, controls: Controls) -> None:
    body = {"ttl_s": 60, "uses": 1000, "role": "client", "issuer": False}
    assert (await admin.post("/invite", body))["token"] == "t"
    assert (await admin.post("/invite", {}))["command"] == "c"
    assert await admin.post("/revoke", {"node": "attic"}) == {"node": "attic", "id": "x"}
    assert await admin.post("/leave", {}) == {"mesh": "home"}
    assert await admin.post("/drain", {}) == {"state": "draining"}
    assert await admin.post("/undrain", {}) == {"state": "ready"}
    assert controls.asked == [
        InviteBody(ttl_s=60, uses=1000, role=Role.CLIENT, issuer=False),
        InviteBody(),
        *("attic", "leave", "drain", "undrain"),
    ]
    assert InviteBody() == InviteBody(ttl_s=86_400, uses=1, role=Role.MEMBER, issuer=False)


async def test_orders_for_models(admin: Admin) -> None:
    assert await admin.post("/load", {"ref": "r"}) == {"model": "named"}
    more = {
        "ref": "r",
        "context": 4096,
        "parallel": 2,
        "replicas": 4096,
        "host": "attic",
        "split": True,
    }
    assert await admin.post("/load", more) == {"model": "named"}
    assert await admin.post("/load", {"ref": "r", "replicas": "auto"}) == {"model": "named"}
    assert await admin.post("/unload", {"model": "m"}) == {"model": "m"}
    assert await admin.post("/plan", {"ref": "r"}) == {"model": "r", "nodes": []}
    assert admin.orders == [
        LoadBody(ref="r", context=None, parallel=None, replicas=None, host=None),
        LoadBody(ref="r", context=4096, parallel=2, replicas=4096, host="attic", split=True),
        LoadBody(ref="r", context=None, parallel=None, replicas="auto", host=None),
        UnloadBody(model="m", drain_s=None),
        "r",
    ]


async def test_a_plan_that_cannot_be_keeps_its_words(admin: Admin) -> None:
    refusal = await admin.refused("/plan", {"ref": "nothing"})
    assert refusal == (404, "model_not_found", "`nothing` is not known")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/invite", {"ttl_s": 59}, "ttl_s"),
        ("/invite", {"ttl_s": 30 * 86_400 + 1}, "ttl_s"),
        ("/invite", {"uses": 0}, "uses"),
        ("/invite", {"uses": 1001}, "uses"),
        ("/invite", {"role": "king"}, "role"),
        ("/invite", {"role": "client", "issuer": True}, "a client cannot be an issuer"),
        ("/invite", {"forever": True}, "forever"),
        ("/invite", [], "body"),
        ("/revoke", {}, "node"),
        ("/revoke", {"node": ""}, "node"),
        ("/revoke", {"node": "x" * 257}, "node"),
        ("/leave", {"really": True}, "really"),
        ("/drain", {"for_s": 5}, "for_s"),
        ("/undrain", {"now": 1}, "now"),
        *(
            ("/load", {"ref": "r", "replicas": count}, "replicas: ")
            for count in (0, 4097, "2", "many", 1.5, True)
        ),
        ("/load", {"ref": "r", "host": ""}, "host"),
        ("/plan", {"ref": ""}, "ref"),
        ("/plan", {"ref": "r", "now": 1}, "now"),
    ],
)
async def test_bad_bodies_are_named_and_reach_nobody(
    admin: Admin, controls: Controls, path: str, body: Any, field: str
) -> None:
    status, code, message = await admin.refused(path, body)
    assert (status, code) == (400, "invalid_request")
    assert field in message
    assert controls.asked == admin.orders == []


async def test_an_order_without_a_body_is_one(admin: Admin) -> None:
    assert await admin.exchange("/drain", None) == (200, {"state": "draining"})


async def test_errors_of_the_mesh_keep_code_and_words(admin: Admin) -> None:
    refusal = await admin.refused("/revoke", {"node": "nobody"})
    assert refusal == (404, "not_found", "no node is called 'nobody'")


@pytest.mark.parametrize("controls", [None])
@pytest.mark.parametrize("path", ["/invite", "/leave", "/drain", "/undrain"])
async def test_without_a_mesh_there_is_nothing_to_order(admin: Admin, path: str) -> None:
    status, code, message = await admin.refused(path, {})
    assert (status, code) == (409, "no_mesh")
    assert "--join" in message
