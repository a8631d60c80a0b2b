from __future__ import annotations

from pathlib import Path

import pytest

from meshd.api.access import Access, host_name
from meshd.config import ApiSettings, Config
from meshd.errors import HostNotAllowed, Unauthorized


def access(api_key: str | None = None, **settings: tuple[str, ...]) -> Access:
    return Access(
        Config(
            name="Spark",
            data_dir=Path("/tmp/x"),
            cache_dir=Path("/tmp/x"),
            api_key=api_key,
            api=ApiSettings.model_validate(settings),
        )
    )


@pytest.mark.parametrize(
    "host",
    [b"127.0.0.1", b"10.0.0.7:9337", b"[::1]:9337", b"localhost:1", b"LOCALHOST.", b"spark:9337"],
)
def test_own_names_and_addresses_are_fine(host: bytes) -> None:
    access().check_host(host)


@pytest.mark.parametrize(
    "host", [b"evil.example", b"localhost.evil.example", b"", b"[::1", b"a:b", b"127.0.0.1.x", b":"]
)
def test_other_names_are_not(host: bytes) -> None:
    with pytest.raises(HostNotAllowed):
        access().check_host(host)


def test_a_name_can_be_allowed() -> None:
    access(allowed_hosts=("Mesh.Example",)).check_host(b"mesh.example:9337")


def test_host_name() -> None:
    assert host_name(b"[FE80::1]:80") == "fe80::1"
    assert host_name(b"a.b:x") is None


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [(b"Bearer secret-key", None), (b"bearer  secret-key", None), (None, b"secret-key")],
)
def test_the_key(authorization: bytes | None, x_api_key: bytes | None) -> None:
    access("secret-key").check_key(authorization, x_api_key)


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [(None, None), (b"Bearer wrong-key", None), (b"Basic secret-key", None), (None, b"secret-ke")],
)
def test_no_or_the_wrong_key(authorization: bytes | None, x_api_key: bytes | None) -> None:
    with pytest.raises(Unauthorized):
        access("secret-key").check_key(authorization, x_api_key)


def test_origins() -> None:
    some = access(allowed_origins=("https://app.example",))
    assert some.check_origin("https://app.example", "localhost:9337") is True
    assert some.check_origin("http://localhost:9337", "localhost:9337") is False
    with pytest.raises(HostNotAllowed):
        some.check_origin("http://localhost:3000", "localhost:9337")
    with pytest.raises(HostNotAllowed):
        some.check_origin("null", "localhost:9337")
    assert access(allowed_origins=("*",)).check_origin("https://any.example", "x") is True
