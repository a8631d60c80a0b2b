"""checks: what `meshd doctor` looks at, each check a function that gives evidence or raises.

May come in: looks that change nothing, and the words for what they find. May not come in: whatever
mends, and verdicts on engines or weights, which the rooms give.
"""

from meshd.cli.checks.checkup import examine
from meshd.cli.checks.subject import Subject, Surroundings

__all__ = ["Subject", "Surroundings", "examine"]
