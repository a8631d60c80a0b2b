"""Events and effects in few words, for the traces of failed runs."""

from __future__ import annotations

from meshd.election.words import (
    DeploymentsSeen,
    NodesSeen,
    OffersMade,
    PublishClaims,
    StartHost,
)
from meshd.view import Deployment


def brief(word: object) -> str:
    """What matters of it."""
    match word:
        case NodesSeen():
            return f"NodesSeen({len(word.nodes)})"
        case DeploymentsSeen():
            return f"DeploymentsSeen({', '.join(map(_wish, word.records))})"
        case OffersMade():
            return (
                f"OffersMade({[(o.bid.model, o.bid.suits.value, o.victims) for o in word.offers]})"
            )
        case PublishClaims():
            return f"PublishClaims({[(c.model, c.epoch, c.state.value) for c in word.claims]})"
        case StartHost():
            return f"StartHost({word.deployment.model}, {word.epoch})"
        case _:
            return repr(word)


def _wish(record: Deployment) -> str:
    if record.removed or record.asleep:
        return f"{record.model} {'removed' if record.removed else 'asleep'}"
    pin = f" on {record.host}" if record.host is not None else ""
    return f"{record.model} v{record.version} x{record.replicas}{pin}"
