"""The check of weights: every set in the cache, by what can be seen at once."""

from __future__ import annotations

from collections import Counter

from meshd.cli.checks.subject import Subject
from meshd.kernel.findings import Fault, NotApplicable

USABLE = ("ok", "unverified", "elsewhere")
"""Verdicts nobody has to act on: whole, not hashed yet, being fetched by another program."""
NAMED = 3
"""Damaged sets that are told one by one."""


def weights(subject: Subject) -> str:
    """Counts by verdict; what is damaged by name. Hashes nothing."""
    if subject.config.client:
        raise NotApplicable("a client loads no models")
    # Late: a doctor who is asked about a client, or a peer, needs none of it.
    from meshd.cache.inventory import take_inventory
    from meshd.cache.places import Places
    from meshd.cache.store import Store
    from meshd.cache.uses import UseBook

    config = subject.config
    places = Places(subject.around.hub.absolute(), config.weights_dir, config.models_dir)
    sets = take_inventory(Store.at(places), UseBook(places.state / "uses")).sets
    if not sets:
        raise NotApplicable(f"no models are in {places.hub}")
    counts = Counter(str(one.verdict.worst.fault) for one in sets)
    words = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    damaged = [one for one in sets if one.verdict.worst.fault not in USABLE]
    if damaged:
        told = "; ".join(f"{one.ref}: {one.verdict.worst.words}" for one in damaged[:NAMED])
        more = f"; and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
        raise Fault(
            f"{words}: {told}{more}",
            f"`meshd cache repair {damaged[0].ref}` fetches what is wrong, `meshd cache rm` "
            "removes it",
        )
    return f"{words} in {places.hub}"
