"""What `--join` and `--mesh` ask for, and who can follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshd.errors import BadConfig, BadInvite, JoinRefused
from meshd.ids import MeshId
from meshd.peers.joining.invites import Invite, encode_invite
from meshd.peers.trust.membership import Membership
from meshd.peers.wishes import Wishes, check_wishes, read_wishes
from meshd.view import Role

HOME, WORK = MeshId("1" * 32), MeshId("2" * 32)


def invite(mesh: MeshId = HOME, name: str = "home", expires_at: int = 1 << 33) -> Invite:
    return Invite(
        mesh, name, b"f" * 32, b"i" * 8, b"s" * 16, expires_at, Role.MEMBER, False, ("10.0.0.1:1",)
    )


def member(mesh: MeshId = HOME, name: str = "home") -> Membership:
    return Membership(mesh, name, Role.MEMBER, b"", b"", b"", Path("/x"), 0.0)


def test_values_are_sorted_by_kind() -> None:
    token = encode_invite(invite())
    wishes = read_wishes((token, "home", "10.0.0.2:9338", "[fd00::1]:9338"))
    assert wishes.invites == (invite(),)
    assert wishes.names == ("home",)
    assert wishes.addresses == ("10.0.0.2:9338", "[fd00::1]:9338")


def test_an_expired_token_is_read_since_a_unit_file_keeps_it_for_ever() -> None:
    old = invite(expires_at=1)
    assert read_wishes((encode_invite(old),)).invites == (old,)


def test_a_damaged_token_is_not_taken_for_a_name() -> None:
    with pytest.raises(BadInvite):
        read_wishes((encode_invite(invite())[:-3],))


def test_1_a_node_with_company_keeps_its_mesh() -> None:
    wishes = Wishes((invite(WORK, "work"),), (), ())
    with pytest.raises(JoinRefused, match=r"belongs to mesh `home`.*`work`.*meshd leave"):
        check_wishes(wishes, member(), True, "default")
    check_wishes(wishes, member(), False, "default")
    check_wishes(Wishes((invite(),), (), ()), member(), True, "default")
    check_wishes(wishes, None, False, "default")


@pytest.mark.parametrize("wishes", [Wishes((), (), ("home",)), Wishes((), ("h:1",), ())])
def test_2_neither_a_name_nor_an_address_lets_anybody_in(wishes: Wishes) -> None:
    with pytest.raises(JoinRefused, match=r"no mesh yet.*meshd invite"):
        check_wishes(wishes, None, False, "default")
    check_wishes(wishes, member(), True, "default")


def test_2_a_name_of_another_mesh() -> None:
    with pytest.raises(JoinRefused, match=r"belongs to mesh `home`, not to `work`"):
        check_wishes(Wishes((), (), ("work",)), member(), False, "default")


def test_3_the_name_of_the_mesh_there_is() -> None:
    none = Wishes((), (), ())
    check_wishes(none, member(), True, "home")
    check_wishes(none, member(), True, "default")
    check_wishes(none, None, False, "work")
    with pytest.raises(BadConfig, match=r"belongs to mesh `home`"):
        check_wishes(none, member(), True, "work")
