"""docs/election.md shows what the machine does, and names the rules of the code."""

from __future__ import annotations

import ast
import re

from meshd.election.hosted import Phase
from meshd.view import ClaimState
from scripts.election_diagrams import DOCUMENT, explored, with_diagrams


def test_the_document_shows_what_the_machine_does() -> None:
    text = DOCUMENT.read_text()
    stale = "docs/election.md is out of date: `python -m scripts.election_diagrams` renews it"
    assert with_diagrams(text) == text, stale


def test_every_state_is_reached_and_left() -> None:
    for transitions, states in zip(explored(), (Phase, ClaimState), strict=True):
        assert {source for source, _ in transitions} == {"[*]", *states}
        assert {target for _, target in transitions} == {"[*]", *states}


def test_the_rules_are_those_of_the_code() -> None:
    """By their numbers, section by section."""
    _, *sections = re.split(r"^### `(meshd/[\w/]+\.py)`", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert sections
    for path, section in zip(sections[::2], sections[1::2], strict=True):
        docstring = ast.get_docstring(ast.parse((DOCUMENT.parent.parent / path).read_text()))
        assert docstring is not None
        assert _numbers(section) == _numbers(docstring), path


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^(\d+)\. ", text, flags=re.MULTILINE)]
