"""Tokens: what `meshd invite` prints, and everything people and networks make of it."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import BadInvite
from meshd.ids import MeshId
from meshd.peers.joining.invites import (
    MAX_TOKEN_CHARACTERS,
    PREFIX,
    Invite,
    decode_invite,
    derive_key,
    encode_invite,
    is_token,
)
from meshd.view import Role

NOW = 1_800_000_000.0
SECRET = bytes(range(100, 116))
INVITE = Invite(
    mesh_id=MeshId("ab" * 16),
    mesh_name="home",
    ca_fingerprint=hashlib.sha256(b"a mesh").digest(),
    invite_id=b"12345678",
    secret=SECRET,
    expires_at=int(NOW) + 3600,
    role=Role.MEMBER,
    issuer=False,
    addresses=("10.0.0.7:9338", "[fd00::7]:9338"),
)
TOKEN = encode_invite(INVITE)

hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda ip: f"[{ip}]"),
    st.from_regex(r"[a-z0-9][a-z0-9.-]{0,60}", fullmatch=True),
)
invites = st.builds(
    Invite,
    mesh_id=st.binary(min_size=16, max_size=16).map(lambda b: MeshId(b.hex())),
    mesh_name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True),
    ca_fingerprint=st.binary(min_size=32, max_size=32),
    invite_id=st.binary(min_size=8, max_size=8),
    secret=st.binary(min_size=16, max_size=16),
    expires_at=st.integers(int(NOW) + 1, (1 << 64) - 1),
    role=st.sampled_from(Role),
    issuer=st.booleans(),
    addresses=st.lists(
        st.builds(lambda h, p: f"{h}:{p}", hosts, st.integers(1, 65_535)), max_size=8
    ).map(tuple),
)


def words(token: str, now: float = NOW) -> str:
    with pytest.raises(BadInvite) as caught:
        decode_invite(token, now)
    assert caught.value.exit_code == 78
    assert "\n" not in caught.value.message
    return caught.value.message


def sealed(body: bytes) -> str:
    """A token of these bytes, its checksum right."""
    data = body + hashlib.sha256(body).digest()[:4]
    return PREFIX + base64.b32encode(data).decode().rstrip("=").lower()


def body_of(token: str) -> bytes:
    text = token.removeprefix(PREFIX).upper()
    return base64.b32decode(text + "=" * (-len(text) % 8))[:-4]


@given(invites)
def test_what_goes_out_comes_in_again(invite: Invite) -> None:
    token = encode_invite(invite)
    assert len(token) <= MAX_TOKEN_CHARACTERS
    assert is_token(token)
    assert decode_invite(token, NOW) == invite
    assert decode_invite(f"  {token.upper()}\n", NOW) == invite


def test_the_longest_one_is_still_one() -> None:
    address = f"{'h' * 249}:65535"
    invite = replace(INVITE, mesh_name="m" * 63, addresses=(address,) * 8)
    assert decode_invite(encode_invite(invite), NOW) == invite


@pytest.mark.parametrize(
    "wrong",
    [
        {"addresses": ("10.0.0.7:9338",) * 9},
        {"addresses": (f"{'h' * 250}:65535",)},
        {"addresses": ("hé:1",)},
        {"mesh_name": "é"},
        {"mesh_id": "xyz"},
    ],
)
def test_what_does_not_fit_is_not_made_into_one(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of several kinds
        encode_invite(replace(INVITE, **wrong))


@pytest.mark.parametrize("length", range(len(TOKEN)))
def test_cut_off_anywhere(length: int) -> None:
    said = words(TOKEN[:length])
    if length < len(PREFIX):
        assert "this is not an invite" in said
        assert "meshd invite" in said
    else:
        assert "cut off or mistyped" in said
        assert "copy the whole token" in said


def test_one_invite_has_one_spelling() -> None:
    """The last letter has bits that carry nothing."""
    assert (len(body_of(TOKEN)) + 4) * 8 % 5 != 0
    for letter in "abcdefghijklmnopqrstuvwxyz234567":
        if letter != TOKEN[-1]:
            assert "cut off or mistyped" in words(TOKEN[:-1] + letter)


@given(
    st.integers(len(PREFIX), len(TOKEN) - 1), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567")
)
def test_one_wrong_letter_anywhere(place: int, letter: str) -> None:
    changed = TOKEN[:place] + letter + TOKEN[place + 1 :]
    if changed != TOKEN:
        assert "cut off or mistyped" in words(changed)


@given(st.data())
def test_mistyped_in_any_other_way(data: st.DataObject) -> None:
    place = data.draw(st.integers(len(PREFIX), len(TOKEN)))
    extra = data.draw(st.text(min_size=1, max_size=5).filter(lambda t: t.strip() == t))
    assert "mistyped" in words(TOKEN[:place] + extra + TOKEN[place:] + "a")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "home",
        "10.0.0.7:9338",
        "meshd",
        "meshd-abc",
        "meshdx-abc",
        "sk-proj-0123456789",
        "eyJhbGciOiJIUzI1NiJ9.e30.x",
        "https://example.org/meshd1-abc",
        "meshd1234567-abc",
        PREFIX + "a" * MAX_TOKEN_CHARACTERS,
        "\0",
        "ｍｅｓｈｄ1-abc",
    ],
)
def test_foreign_text_is_no_invite(text: str) -> None:
    assert words(text) == (
        "this is not an invite; one begins with meshd1- and is printed by `meshd invite`"
    )


@pytest.mark.parametrize(
    "token", ["meshd2-" + TOKEN.removeprefix(PREFIX), "meshd999999-", "MESHD0-x"]
)
def test_of_another_version_by_its_prefix(token: str) -> None:
    assert is_token(token)
    assert "of another version of meshd; upgrade" in words(token)


def test_of_another_version_by_its_first_byte() -> None:
    assert "of another version of meshd; upgrade" in words(sealed(b"\2" + body_of(TOKEN)[1:]))


def test_written_by_one_that_knows_more() -> None:
    """The checksum is right, so it was not mistyped."""
    body = body_of(TOKEN)
    flags = 1 + 16 + 1 + len("home") + 32 + 8 + 16 + 8
    for odd in (
        body + b"more",
        body[:-1],
        body[:flags] + b"\4" + body[flags + 1 :],
        body[: flags + 1] + b"\xff" + body[flags + 2 :],
        body.replace(b"home", b"h me"),
        body.replace(b"home", b"h\xffme"),
        body.replace(b"10.0.0.7:9338", b"10.0.0.7:0000"),
        body.replace(b"10.0.0.7:9338", b"10.0.0.7/9338"),
        b"\1",
    ):
        assert odd != body
        assert "does not understand; upgrade meshd here" in words(sealed(odd)), odd


@given(st.binary(max_size=300))
def test_any_bytes_behind_a_right_checksum(data: bytes) -> None:
    assert words(sealed(data))
    assert words(sealed(b"\1" + data))


@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    assert words(text)
    assert words(PREFIX + text)


def test_expired_by_the_clock_here() -> None:
    decode_invite(TOKEN, NOW + 3599)
    said = words(TOKEN, NOW + 3600)
    assert "invite to mesh home expired on 2027-01-15 09:00 UTC" in said
    assert "clock of this machine says 2027-01-15 09:00 UTC" in said
    assert "meshd invite" in said


def test_the_clock_is_asked_when_no_time_is_given() -> None:
    with pytest.raises(BadInvite, match="expired"):
        decode_invite(encode_invite(replace(INVITE, expires_at=1)))
    assert decode_invite(encode_invite(replace(INVITE, expires_at=1 << 40))).expires_at == 1 << 40


def test_no_representation_and_no_error_shows_the_secret() -> None:
    parts = (TOKEN, TOKEN[60:90], SECRET.hex(), repr(SECRET), base64.b64encode(SECRET).decode())
    shown = [repr(INVITE), str(INVITE), f"{INVITE!r:.500}"]
    shown += [words(TOKEN[:-1]), words(TOKEN, NOW * 2), words(TOKEN + "a"), words("x" + TOKEN)]
    shown += [words(sealed(body_of(TOKEN) + b"x"))]
    for text in shown:
        assert not any(part in text for part in parts), text


def test_the_key_is_not_the_secret() -> None:
    assert INVITE.key == derive_key(SECRET)
    assert SECRET not in INVITE.key
    assert len(INVITE.key) == 32
    assert derive_key(b"\0" * 16) != INVITE.key
