"""What is left out of an advert that would not fit into its envelope. Pure."""

from __future__ import annotations

from typing import Any, Final

import orjson

MAX_BODY_BYTES: Final = 40 * 1024
"""Of an advert's JSON; signed and in base64 it must fit into one envelope of 64 KiB."""


def make_fit(body: dict[str, Any]) -> None:
    """Full-policy of an advert: models that are not served go first, then reasons, which are for
    people, then bids, the smallest loads of the demand, weights and what is served, and claims
    last: a claim nobody hears of makes two hosts. Of a list the first rows stay.

    A client node's has nothing but demand."""
    served = sum(model["instance"] is not None for model in body.get("models", ()))
    _cut(body, "models", served)
    for part in ("bids", "claims"):
        _cut_reasons(body, part)
    for part in ("bids", "demand", "weights", "models", "claims"):
        _cut(body, part)


def _cut(body: dict[str, Any], part: str, least: int = 0) -> None:
    while len(rows := body.get(part, ())) > least and not _fits(body):
        kept = max(least, len(rows) // 2)
        body[part] = dict(list(rows.items())[:kept]) if type(rows) is dict else rows[:kept]


def _cut_reasons(body: dict[str, Any], part: str) -> None:
    if part in body and not _fits(body):
        body[part] = [{k: v for k, v in row.items() if k != "reason"} for row in body[part]]


def _fits(body: dict[str, Any]) -> bool:
    return len(orjson.dumps(body)) <= MAX_BODY_BYTES
