"""Verdicts: what is wrong with a set of weights, or that nothing is. Pure.

`judge` compares a manifest (or, for local files without one, what their names promise) with what
`observe` saw of each file and what the ledger remembers of its hash. Every set of observations has
exactly one verdict a file; only a set whose files are all OK may reach an engine.
"""

from __future__ import annotations

from enum import StrEnum


class Fault(StrEnum):
    """What a look at one file can come to; the first that applies, in this order."""

    MISSING = "missing"
    """Nothing there, or a link to nothing."""
    ELSEWHERE = "elsewhere"
    """Not there yet: another program is downloading it."""
    FOREIGN = "foreign"
    """Something that is no weights at all: an LFS pointer, a web page, an error message."""
    SHORT = "short"
    LONG = "long"
    CORRUPT = "corrupt"
    """Of the right size and wrong: hash, header, a tensor outside the file, or out of step with the
    rest of the set."""
    UNVERIFIED = "unverified"
    """Nothing wrong to see, but its sha256 was not computed since it last changed."""
    OK = "ok"
