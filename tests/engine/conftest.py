"""Fixtures of the supervision of real engines."""

from tests.runtime.conftest import short_dir, stage

__all__ = ["short_dir", "stage"]
