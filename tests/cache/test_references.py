"""What people write for a model, and the name it gets."""

from __future__ import annotations

import contextlib
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.cache.catalog import Catalog, Entry
from meshd.cache.references import (
    BuiltinRef,
    FileRef,
    HubRef,
    format_ref,
    hub_ref_of,
    model_id,
    parse_hub_ref,
    parse_ref,
)
from meshd.errors import BadReference

COMMIT = "5e1f" * 10
MINE = Catalog([Entry(name="Mine", repo="me/Mine-GGUF", file="d/Mine-Q8_0-00002-of-00003.gguf")])


def test_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here.gguf").touch()
    (tmp_path / "owner/repo").mkdir(parents=True)
    (tmp_path / "owner/repo/x.gguf").touch()
    assert parse_ref("builtin") == BuiltinRef()
    assert parse_ref("here.gguf") == FileRef(tmp_path / "here.gguf")
    assert parse_ref("./x.gguf") == FileRef(tmp_path / "x.gguf")
    assert parse_ref("~/x.gguf") == FileRef(tmp_path / "x.gguf")
    assert parse_ref("/a/b.gguf") == FileRef(Path("/a/b.gguf"))
    assert parse_ref("owner/repo/x.gguf") == FileRef(tmp_path / "owner/repo/x.gguf")
    assert parse_ref("owner/repo/y.gguf") == HubRef("owner/repo", path="y.gguf")


@pytest.mark.parametrize(
    ("ref", "parsed"),
    [
        ("o/r", HubRef("o/r")),
        ("o/r@main", HubRef("o/r")),
        ("o/r@v1.0", HubRef("o/r", "v1.0")),
        ("o/r@feature/x:q4_k_m", HubRef("o/r", "feature/x", "Q4_K_M")),
        (f"o/r@{COMMIT}", HubRef("o/r", COMMIT)),
        ("o/r:UD-Q4_K_XL", HubRef("o/r", None, "UD-Q4_K_XL")),
        ("o/r/f.gguf", HubRef("o/r", path="f.gguf")),
        ("o/r/F.GGUF", HubRef("o/r", path="F.GGUF")),
        ("o/r@v1/d/e/f.gguf", HubRef("o/r", "v1", path="d/e/f.gguf")),
        ("o/r@refs/pr/7/d/f.gguf", HubRef("o/r", "refs/pr/7", path="d/f.gguf")),
        ("o/r/d/f-00003-of-00004.gguf", HubRef("o/r", path="d/f-00001-of-00004.gguf")),
        ("o/r/with blank.gguf", HubRef("o/r", path="with blank.gguf")),
        ("mine", HubRef("me/Mine-GGUF", path="d/Mine-Q8_0-00001-of-00003.gguf")),
    ],
)
def test_the_hub(ref: str, parsed: HubRef) -> None:
    assert parse_ref(ref, MINE) == parsed
    assert parse_hub_ref(format_ref(parsed)) == parsed


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("", "is not in the catalog; a REF is"),
        ("min", "close to it are Mine"),
        ("Qwen3", "is not in the catalog; a REF is `builtin`"),
        ("none.gguf", "there is no file .*/none.gguf"),
        ("dir/none.gguf", "there is no file dir/none.gguf, and a file of the hub"),
        ("~nobody-of-that-name/x.gguf", "no such user"),
        ("o/r:", "names no quantisation"),
        ("o/r/", "is no REF"),
        ("o/r/f.bin", "is no REF"),
        ("o/r@:Q4_0", "is no REF"),
        ("ö/r", "is no REF"),
        ("o/r --revision x", "is no REF"),
        ("https://huggingface.co/o/r", "is an address"),
        ("hf.co/o/r:Q4_0", "is an address"),
        ("o/r@feature/../x", "leads out"),
        ("o/r/../../f.gguf", "leads out"),
        ("o/r@v/a//f.gguf", "leads out"),
        ("o--p/r", "cannot be the name"),
        ("o/r..s", "cannot be the name"),
        ("o/r.git", "cannot be the name"),
        ("o/r/f-00005-of-00004.gguf", "there is no shard 00005 of 4"),
        ("o/r/f-00000-of-00004.gguf", "there is no shard 00000 of 4"),
    ],
)
def test_what_is_no_reference(ref: str, words: str) -> None:
    with pytest.raises(BadReference, match=words):
        parse_ref(ref, MINE)


def test_a_branch_with_slashes_before_a_path_is_taken_for_a_directory() -> None:
    assert parse_hub_ref("o/r@feature/x/f.gguf") == HubRef("o/r", "feature", path="x/f.gguf")


NAMES = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_.]|-(?!-)){0,20}[A-Za-z0-9]", fullmatch=True).filter(
    lambda name: ".." not in name and not name.lower().endswith((".git", ".gguf"))
)
PARTS = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=12)


@given(NAMES, NAMES, st.none() | PARTS, st.sampled_from(["", "quant", "path"]), PARTS)
def test_the_canonical_form_is_read_back(
    owner: str, name: str, revision: str | None, form: str, part: str
) -> None:
    revision = None if revision == "main" else revision
    ref = HubRef(
        f"{owner}/{name}",
        revision,
        part.upper() if form == "quant" else None,
        f"{part}/{part}.gguf" if form == "path" else None,
    )
    assert parse_hub_ref(format_ref(ref)) == ref


@given(st.text(max_size=60))
def test_any_text_is_a_reference_or_said_to_be_none(text: str) -> None:
    with contextlib.suppress(BadReference):
        parse_ref(text, MINE)


def test_branch_and_pin() -> None:
    assert HubRef("o/r").branch == "main"
    assert HubRef("o/r", "v1").branch == "v1"
    assert HubRef("o/r", COMMIT).is_pinned
    assert not HubRef("o/r", COMMIT[:7]).is_pinned
    assert not HubRef("o/r").is_pinned


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("builtin", "builtin"),
        ("/a/Qwen3.5-Q4_K_M.gguf", "Qwen3.5-Q4_K_M"),
        ("/a/Big-Q8_0-00002-of-00009.gguf", "Big-Q8_0"),
        ("/a/UPPER.GGUF", "UPPER"),
        ("mine", "Mine"),
        ("MINE", "Mine"),
        ("o/Big-GGUF/Q8_0/Big-Q8_0-00002-of-00009.gguf", "Big-Q8_0"),
        ("o/Big-GGUF:q4_k_m", "Big-Q4_K_M"),
        ("o/Big-gguf@v2:UD-Q4_K_XL", "Big-UD-Q4_K_XL"),
        ("o/Big-GGUF", "Big"),
        ("o/plain", "plain"),
        ("o/plain:Q8_0", "plain-Q8_0"),
    ],
)
def test_model_names(ref: str, name: str) -> None:
    assert model_id(ref, MINE) == name


@pytest.mark.parametrize("ref", ["/a/.gguf", "o/r/d/.gguf"])
def test_a_file_without_a_name(ref: str) -> None:
    with pytest.raises(BadReference, match="no file name"):
        model_id(ref)


def test_a_file_of_the_hugging_face_cache(tmp_path: Path) -> None:
    hub = tmp_path / "real"
    snapshot = hub / "models--o--n" / "snapshots" / COMMIT
    (snapshot / "Q8_0").mkdir(parents=True)
    file = snapshot / "Q8_0" / "n-00002-of-00002.gguf"
    file.symlink_to("../../../blobs/abc")
    expected = HubRef("o/n", COMMIT, path="Q8_0/n-00001-of-00002.gguf")
    assert hub_ref_of(file, hub) == expected
    (tmp_path / "linked").symlink_to(hub)
    assert hub_ref_of(file, tmp_path / "linked") == expected
    assert hub_ref_of(tmp_path / "linked" / file.relative_to(hub), hub) == expected


@pytest.mark.parametrize(
    "path",
    [
        "elsewhere/m.gguf",
        f"hub/models--o--n/snapshots/{COMMIT}",
        "hub/models--o--n/snapshots/main/m.gguf",
        "hub/models--o--n/blobs/abc",
        f"hub/datasets--o--n/snapshots/{COMMIT}/m.gguf",
        f"hub/models--gpt2/snapshots/{COMMIT}/m.gguf",
        f"hub/models--o--n--m/snapshots/{COMMIT}/m.gguf",
        f"hub/models--o--n/snapshots/{COMMIT}/README.md",
        f"hub/models--o--n/snapshots/{COMMIT}/m-00003-of-00002.gguf",
    ],
)
def test_files_that_belong_to_no_repository(path: str, tmp_path: Path) -> None:
    assert hub_ref_of(tmp_path / path, tmp_path / "hub") is None
