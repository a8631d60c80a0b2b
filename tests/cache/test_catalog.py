"""The names of the catalog, and adding one's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from meshd.cache.catalog import Catalog, Entry, load_catalog
from meshd.cache.quants import quant_of
from meshd.cache.references import HubRef, model_id, parse_ref
from meshd.errors import BadConfig


def test_the_packaged_catalog_is_sane() -> None:
    catalog = load_catalog()
    assert 25 <= len(catalog.entries) <= 60
    for entry in catalog.entries:
        parsed = parse_ref(entry.name)
        assert isinstance(parsed, HubRef)
        assert parsed.repo == entry.repo
        assert model_id(entry.name.upper()) == entry.name
        assert entry.size_bytes is not None
        assert quant_of(entry.file) == quant_of(entry.name)
        if entry.draft is not None:
            draft = catalog.find(entry.draft)
            assert draft is not None, f"{entry.name} names a draft that is not there"
            assert draft.size_bytes is not None
            assert draft.size_bytes * 2 < entry.size_bytes


def test_no_two_entries_are_the_same_file() -> None:
    entries = load_catalog().entries
    assert len({(entry.repo, entry.file) for entry in entries}) == len(entries)


def test_names_close_to_one() -> None:
    catalog = load_catalog()
    assert "Qwen3-8B-Q4_K_M" in catalog.close_names("qwen3-8b")
    assert catalog.close_names("Qwen3-8B-Q4_K_N")[0] == "Qwen3-8B-Q4_K_M"
    assert len(catalog.close_names("q4_k_m")) == 3
    assert catalog.close_names("zzz") == ()
    assert catalog.close_names("") == ()


def test_entries_of_ones_own_win(tmp_path: Path) -> None:
    file = tmp_path / "catalog.json"
    assert load_catalog(file) is load_catalog(), "a file that is not there adds nothing"
    file.write_text(
        '[{"name": "Mine", "repo": "me/M-GGUF", "file": "M.gguf"},'
        ' {"name": "qwen3-4b-Q4_K_M", "repo": "me/Q", "file": "q.gguf", "size_bytes": 1}]'
    )
    catalog = load_catalog(file)
    assert parse_ref("mine", catalog) == HubRef("me/M-GGUF", path="M.gguf")
    assert parse_ref("Qwen3-4B-Q4_K_M", catalog) == HubRef("me/Q", path="q.gguf")
    assert model_id("Qwen3-4B-Q4_K_M", catalog) == "qwen3-4b-Q4_K_M"
    assert len(catalog.entries) == len(load_catalog().entries) + 1
    assert load_catalog().find("mine") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "is wrong: Invalid JSON"),
        ("{}", "is wrong"),
        ('[{"name": "x", "repo": "o/r", "file": "../f.gguf"}]', "entry 0.file"),
        ('[{"name": "x", "repo": "r", "file": "f.gguf"}]', "entry 0.repo"),
        ('[{"name": "x", "repo": "o/r", "file": "f.bin"}]', "entry 0: Value error, .*no REF"),
        ('[{"name": "x", "repo": "o--p/r", "file": "f.gguf"}]', "entry 0: .*cannot be the name"),
        ('[{"name": "a/b", "repo": "o/r", "file": "f.gguf"}]', "entry 0.name"),
        ('[{"name": "x", "repo": "o/r", "file": "f.gguf", "quant": "Q"}]', "entry 0.quant"),
    ],
)
def test_a_file_that_is_wrong(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "catalog.json"
    file.write_text(text)
    with pytest.raises(BadConfig, match=words) as caught:
        load_catalog(file)
    assert str(file) in caught.value.message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot be read: Is a directory"):
        load_catalog(tmp_path)
    (tmp_path / "huge.json").write_bytes(b" " * (4 * 1024 * 1024 + 1))
    with pytest.raises(BadConfig, match="larger than"):
        load_catalog(tmp_path / "huge.json")


def test_the_later_of_two_entries_counts() -> None:
    first = Entry(name="x", repo="o/a", file="a.gguf")
    assert Catalog([first, Entry(name="X", repo="o/b", file="b.gguf")]).find("x") != first


def test_names_that_are_paths_need_no_catalog() -> None:
    script = (
        "import sys\n"
        "from meshd.cache.references import model_id\n"
        "model_id('builtin'), model_id('/a/b.gguf'), model_id('o/r:Q8_0')\n"
        "assert 'meshd.cache.catalog' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30)
