"""What a check found: one line of `meshd doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """It does not apply here, or an earlier failure left nothing to look at; the evidence says."""


@dataclass(frozen=True, slots=True)
class Finding:
    step: str
    state: Verdict
    evidence: str
    """What was seen, in one line."""
    remedy: str | None = None
    """What to do; set for what failed."""


class Fault(Exception):
    """Raised inside a check: it failed."""

    def __init__(self, evidence: str, remedy: str) -> None:
        super().__init__(evidence)
        self.evidence = evidence
        self.remedy = remedy


class NotApplicable(Exception):
    """Raised inside a check: it says nothing here, for this reason."""
