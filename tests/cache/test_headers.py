"""Headers are parsed once while their file stays as it is, and never taken for another's."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from meshd.cache import headers as keeping
from meshd.cache import observe as observing
from meshd.cache.facts import FileFacts
from meshd.cache.gguf_cursor import LONG_ARRAY, Walks
from meshd.cache.gguf_header import GgufHeader, parse_header
from meshd.cache.headers import Headers
from meshd.cache.observe import observe

FACTS = FileFacts("/m", 1, 1, 1, 1)
CHANGES: list[dict[str, Any]] = [
    {"mtime_ns": 2},
    {"ctime_ns": 2},
    {"size": 2},
    {"inode": 2},
    {"real_path": "/n"},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """With a vocabulary that does not fit into the first read."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token-{number}" for number in range(2 * LONG_ARRAY)])
    writer.add_tensor("t", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is too new."""
    monkeypatch.setattr(keeping, "is_settled", lambda *_: True)


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[Walks]:
    """What was known before each time a header was parsed."""
    counted: list[Walks] = []

    def counting(prefix: bytes, size: int, walks: Walks | None) -> GgufHeader:
        counted.append(dict(walks or {}))
        return parse_header(prefix, size, walks)

    monkeypatch.setattr(observing, "parse_header", counting)
    return counted


def seen_header(path: Path) -> GgufHeader:
    header = observe(path).header
    assert header is not None
    return header


def test_a_header_is_found_while_nothing_changed(file: Path) -> None:
    headers = Headers()
    header = seen_header(file)
    headers.keep(FACTS, header, {}, read_from_ns=time.time_ns())
    assert headers.find(FACTS) is header
    for change in CHANGES:
        assert headers.find(replace(FACTS, **change)) is None


@pytest.mark.usefixtures("settled")
def test_an_unchanged_file_is_parsed_once(file: Path, parses: list[Walks]) -> None:
    headers = Headers()
    first = observe(file, headers)
    parses.clear()
    assert observe(file, headers) == first
    assert not parses
    file.write_bytes(file.read_bytes() + b"more")
    assert observe(file, headers).header == first.header
    assert parses


def test_a_new_file_is_parsed_every_time(file: Path, parses: list[Walks], tmp_path: Path) -> None:
    """Of a file written just now a header kept could be that of other bytes."""
    headers = Headers(tmp_path / "notes")
    second_ns = 1_000_000_000
    os.utime(file, ns=(time.time_ns() // second_ns * second_ns,) * 2)
    observe(file, headers)
    parses.clear()
    observe(file, headers)
    assert parses
    assert not (tmp_path / "notes").exists()


def test_headers_kept_are_bounded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = seen_header(file)
    size = 1 + len(header.tensors) + len(header.metadata)
    monkeypatch.setattr(keeping, "MAX_KEPT_TENSORS", 3 * size)
    headers = Headers()
    facts = [FileFacts(f"/{number}", 1, 1, number, 1) for number in range(4)]
    for one in facts[:3]:
        headers.keep(one, header, {}, read_from_ns=time.time_ns())
    assert headers.find(facts[0]) is header  # used last, so it stays
    headers.keep(facts[3], header, {}, read_from_ns=time.time_ns())
    assert [headers.find(one) is not None for one in facts] == [True, False, True, True]
    headers.keep(facts[3], header, {}, read_from_ns=time.time_ns())
    assert headers.find(facts[0]) is header


# -- on disk --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("settled")
def test_the_next_process_does_not_walk_again(
    file: Path, tmp_path: Path, parses: list[Walks]
) -> None:
    first = observe(file, Headers(tmp_path / "notes"))
    assert first.facts is not None
    (note,) = (tmp_path / "notes").iterdir()
    written_at = note.stat().st_mtime_ns
    walks = Headers(tmp_path / "notes").find_walks(first.facts)
    assert [left for left, _ in walks.values()] == [0]
    parses.clear()
    assert observe(file, Headers(tmp_path / "notes")) == first
    assert parses[-1] == walks
    assert note.stat().st_mtime_ns == written_at
    for change in CHANGES:
        assert Headers(tmp_path / "notes").find_walks(replace(first.facts, **change)) == {}
    assert Headers().find_walks(first.facts) == {}


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("damage", [b"", b"null", b"{", b'{"facts":[]}', b"\xff"])
def test_a_torn_note_is_none(file: Path, tmp_path: Path, damage: bytes) -> None:
    first = observe(file, Headers(tmp_path / "notes"))
    (note,) = (tmp_path / "notes").iterdir()
    whole = note.read_bytes()
    note.write_bytes(damage)
    assert observe(file, Headers(tmp_path / "notes")) == first
    assert note.read_bytes() == whole


@pytest.mark.usefixtures("settled")
def test_a_place_that_cannot_be_written_is_none(file: Path) -> None:
    assert observe(file, Headers(file / "notes")) == observe(file)
