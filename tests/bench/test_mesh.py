from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields

import pytest

from bench.crowd import Crowd
from bench.figures import Rounds
from bench.membership import NOBODYS, Join, Times, elsewhere
from bench.mesh import goals_of, main, p95
from meshd.ids import MeshId
from meshd.peers.joining.invites import Invite, decode_invite, encode_invite
from meshd.view import Role


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], 3.0), (range(1, 21), 19), (range(20, 0, -1), 19), (range(1, 31), 29), ([1, 9], 9)],
)
def test_p95(values: Sequence[float], expected: float) -> None:
    assert p95(values) == expected


def all_times(seconds: float) -> Times:
    join = Join(seconds, 0.0)
    return Times(join, join, *[seconds] * (len(fields(Times)) - 2))


def test_goals_take_the_worst_cycle() -> None:
    good, bad = all_times(0.1), all_times(9.0)
    verdicts = [goal.verdict for goal in goals_of([good] * 19, Rounds([]), [])]
    assert set(verdicts) == {"reached"}
    one_bad = {goal.what: goal.verdict for goal in goals_of([*[good] * 29, bad], Rounds([]), [])}
    assert one_bad.pop("join, static, p95") == one_bad.pop("join, mDNS, p95") == "reached"
    assert set(one_bad.values()) == {"not reached"}


def test_goals_take_the_largest_crowd_and_what_a_hop_adds() -> None:
    crowds = [Crowd(30, 60, 80, 95, 0.5, 3), Crowd(3, 60, 60, 60, 0.1, 0.1)]
    kinds = {k: {"p50_us": 100.0, "errors": 0} for k in ("one", "load", "sse1", "sse64")}
    slower = {k: {"p50_us": 800.0, "errors": 0} for k in kinds}
    goals = goals_of([], Rounds([{"host": kinds, "remote": slower}]), crowds)
    assert [(g.value, g.verdict) for g in goals] == [
        (0.7, "not reached"),
        (0, "reached"),
        (95, "not reached"),
        (3, "not reached"),
    ]


def test_a_token_that_leads_nowhere_is_the_same_invite() -> None:
    invite = Invite(
        mesh_id=MeshId("0" * 32),
        mesh_name="bench",
        ca_fingerprint=b"f" * 32,
        invite_id=b"i" * 8,
        secret=b"s" * 16,
        expires_at=int(time.time()) + 60,
        role=Role.MEMBER,
        issuer=False,
        addresses=("10.77.0.1:9338", "[fd77::1]:9338"),
    )
    found = decode_invite(elsewhere(encode_invite(invite)))
    assert found.addresses == (NOBODYS,)
    assert (found.invite_id, found.secret) == (invite.invite_id, invite.secret)


def test_parts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "crwd"])
    assert "no part is called crwd" in capsys.readouterr().err
