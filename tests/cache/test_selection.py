"""Which files a reference means, in listings named as the well-known publishers name theirs."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from meshd.cache.quants import PREFERENCE, in_order, quant_of
from meshd.cache.references import parse_hub_ref
from meshd.cache.selection import RepoFile, Selection, select, to_manifest
from meshd.errors import BadReference, HubRefused

COMMIT = "ab" * 20


def listing(*paths: str) -> list[RepoFile]:
    """Files of a repository; `{4}` in a path stands for four shards."""
    files = []
    for path in paths:
        split = re.search(r"\{(\d+)\}", path)
        count = int(split[1]) if split else 1
        for number in range(1, count + 1):
            name = re.sub(r"\{\d+\}", f"{number:05d}-of-{count:05d}", path)
            files.append(RepoFile(name, 1000 + number, hashlib.sha256(name.encode()).hexdigest()))
    return files


UNSLOTH = listing(
    ".gitattributes",
    "README.md",
    "config.json",
    "imatrix_unsloth.gguf_file",
    "BF16/Qwen3-30B-A3B-BF16-{2}.gguf",
    "Qwen3-30B-A3B-IQ4_NL.gguf",
    "Qwen3-30B-A3B-IQ4_XS.gguf",
    "Qwen3-30B-A3B-Q2_K.gguf",
    "Qwen3-30B-A3B-Q2_K_L.gguf",
    "Qwen3-30B-A3B-Q4_0.gguf",
    "Qwen3-30B-A3B-Q4_1.gguf",
    "Qwen3-30B-A3B-Q4_K_M.gguf",
    "Qwen3-30B-A3B-Q4_K_S.gguf",
    "Qwen3-30B-A3B-Q8_0.gguf",
    "Qwen3-30B-A3B-UD-IQ1_S.gguf",
    "Qwen3-30B-A3B-UD-Q4_K_XL.gguf",
    "Qwen3-30B-A3B-UD-Q8_K_XL.gguf",
)
UNSLOTH_LARGE = listing(
    "Q4_K_M/MiniMax-M2.5-Q4_K_M-{4}.gguf",
    "Q8_0/MiniMax-M2.5-Q8_0-{6}.gguf",
    "UD-Q4_K_XL/MiniMax-M2.5-UD-Q4_K_XL-{3}.gguf",
    "UD-TQ1_0/MiniMax-M2.5-UD-TQ1_0.gguf",
)
UNSLOTH_VISION = listing(
    "Qwen3.5-4B-BF16.gguf",
    "Qwen3.5-4B-Q4_K_M.gguf",
    "Qwen3.5-4B-UD-Q4_K_XL.gguf",
    "mmproj-BF16.gguf",
    "mmproj-F16.gguf",
    "mmproj-F32.gguf",
)
BARTOWSKI = listing(
    "google_gemma-3-27b-it-IQ4_XS.gguf",
    "google_gemma-3-27b-it-Q4_K_L.gguf",
    "google_gemma-3-27b-it-Q4_K_M.gguf",
    "google_gemma-3-27b-it-Q6_K.gguf",
    "google_gemma-3-27b-it-Q6_K_L.gguf",
    "google_gemma-3-27b-it-Q8_0.gguf",
    "google_gemma-3-27b-it-bf16/google_gemma-3-27b-it-bf16-{2}.gguf",
    "google_gemma-3-27b-it-imatrix.gguf",
    "mmproj-google_gemma-3-27b-it-bf16.gguf",
    "mmproj-google_gemma-3-27b-it-f16.gguf",
    "mmproj-google_gemma-3-27b-it-f32.gguf",
)
GGML_ORG = listing(
    "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf",
    "Qwen2.5-VL-7B-Instruct-Q8_0.gguf",
    "Qwen2.5-VL-7B-Instruct-f16.gguf",
    "mmproj-Qwen2.5-VL-7B-Instruct-Q8_0.gguf",
    "mmproj-Qwen2.5-VL-7B-Instruct-f16.gguf",
)
GGML_ORG_GPT_OSS = listing("gpt-oss-120b-mxfp4-{3}.gguf")
QWEN = listing(
    "qwen2.5-coder-7b-instruct-fp16-{4}.gguf",
    "qwen2.5-coder-7b-instruct-q2_k.gguf",
    "qwen2.5-coder-7b-instruct-q4_0-{2}.gguf",
    "qwen2.5-coder-7b-instruct-q4_0.gguf",
    "qwen2.5-coder-7b-instruct-q4_k_m-{2}.gguf",
    "qwen2.5-coder-7b-instruct-q4_k_m.gguf",
    "qwen2.5-coder-7b-instruct-q8_0-{3}.gguf",
)
QWEN_NEXT = listing(
    "Qwen3-Coder-Next-Q4_K_M/Qwen3-Coder-Next-Q4_K_M-{4}.gguf",
    "Qwen3-Coder-Next-Q8_0/Qwen3-Coder-Next-Q8_0-{6}.gguf",
)
MRADERMACHER = listing(
    "Mixtral-8x7B.i1-IQ2_XXS.gguf", "Mixtral-8x7B.i1-Q4_K_M.gguf", "Mixtral-8x7B.imatrix.gguf"
)
PLAIN_SHARDS = listing("Q4_K_M/model-{3}.gguf", "Q5_K_M/model-{3}.gguf")
DRAFTED = listing("Big-Q4_0.gguf", "draft/Small-Q4_K_M.gguf", "Big-DRAFT-0.6B-Q4_K_M.gguf")


@pytest.mark.parametrize(
    ("files", "ref", "first", "count"),
    [
        (UNSLOTH, "u/q", "Qwen3-30B-A3B-Q4_K_M.gguf", 1),
        (UNSLOTH, "u/q:q4_k_m", "Qwen3-30B-A3B-Q4_K_M.gguf", 1),
        (UNSLOTH, "u/q:UD-Q4_K_XL", "Qwen3-30B-A3B-UD-Q4_K_XL.gguf", 1),
        (UNSLOTH, "u/q:ud-iq1_s", "Qwen3-30B-A3B-UD-IQ1_S.gguf", 1),
        (UNSLOTH, "u/q:Q2_K", "Qwen3-30B-A3B-Q2_K.gguf", 1),
        (UNSLOTH, "u/q:Q2_K_L", "Qwen3-30B-A3B-Q2_K_L.gguf", 1),
        (UNSLOTH, "u/q:IQ4_NL", "Qwen3-30B-A3B-IQ4_NL.gguf", 1),
        (UNSLOTH, "u/q:bf16", "BF16/Qwen3-30B-A3B-BF16-00001-of-00002.gguf", 2),
        (UNSLOTH_LARGE, "u/m", "Q4_K_M/MiniMax-M2.5-Q4_K_M-00001-of-00004.gguf", 4),
        (UNSLOTH_LARGE, "u/m:UD-TQ1_0", "UD-TQ1_0/MiniMax-M2.5-UD-TQ1_0.gguf", 1),
        (
            UNSLOTH_LARGE,
            "u/m/UD-Q4_K_XL/MiniMax-M2.5-UD-Q4_K_XL-00003-of-00003.gguf",
            "UD-Q4_K_XL/MiniMax-M2.5-UD-Q4_K_XL-00001-of-00003.gguf",
            3,
        ),
        (BARTOWSKI, "b/g", "google_gemma-3-27b-it-Q4_K_M.gguf", 1),
        (BARTOWSKI, "b/g:Q4_K_L", "google_gemma-3-27b-it-Q4_K_L.gguf", 1),
        (BARTOWSKI, "b/g:Q6_K", "google_gemma-3-27b-it-Q6_K.gguf", 1),
        (
            BARTOWSKI,
            "b/g:BF16",
            "google_gemma-3-27b-it-bf16/google_gemma-3-27b-it-bf16-00001-of-00002.gguf",
            2,
        ),
        (GGML_ORG, "g/q:F16", "Qwen2.5-VL-7B-Instruct-f16.gguf", 1),
        (GGML_ORG, "g/q:Q8_0", "Qwen2.5-VL-7B-Instruct-Q8_0.gguf", 1),
        (GGML_ORG_GPT_OSS, "g/o", "gpt-oss-120b-mxfp4-00001-of-00003.gguf", 3),
        (QWEN, "q/c", "qwen2.5-coder-7b-instruct-q4_k_m.gguf", 1),
        (QWEN, "q/c:Q4_0", "qwen2.5-coder-7b-instruct-q4_0.gguf", 1),
        (QWEN, "q/c:FP16", "qwen2.5-coder-7b-instruct-fp16-00001-of-00004.gguf", 4),
        (QWEN, "q/c:f16", "qwen2.5-coder-7b-instruct-fp16-00001-of-00004.gguf", 4),
        (QWEN, "q/c:Q8_0", "qwen2.5-coder-7b-instruct-q8_0-00001-of-00003.gguf", 3),
        (
            QWEN,
            "q/c/qwen2.5-coder-7b-instruct-q4_k_m-00002-of-00002.gguf",
            "qwen2.5-coder-7b-instruct-q4_k_m-00001-of-00002.gguf",
            2,
        ),
        (
            QWEN_NEXT,
            "q/n",
            "Qwen3-Coder-Next-Q4_K_M/Qwen3-Coder-Next-Q4_K_M-00001-of-00004.gguf",
            4,
        ),
        (MRADERMACHER, "m/m", "Mixtral-8x7B.i1-Q4_K_M.gguf", 1),
        (MRADERMACHER, "m/m:IQ2_XXS", "Mixtral-8x7B.i1-IQ2_XXS.gguf", 1),
        (PLAIN_SHARDS, "o/r", "Q4_K_M/model-00001-of-00003.gguf", 3),
        (PLAIN_SHARDS, "o/r:Q5_K_M", "Q5_K_M/model-00001-of-00003.gguf", 3),
        (DRAFTED, "o/r", "Big-Q4_0.gguf", 1),
        (DRAFTED, "o/r/draft/Small-Q4_K_M.gguf", "draft/Small-Q4_K_M.gguf", 1),
        (listing("Q-0.5B-DRAFT-Q4_0.gguf"), "j/Q-0.5B-DRAFT-GGUF", "Q-0.5B-DRAFT-Q4_0.gguf", 1),
        (listing("only.gguf"), "o/r", "only.gguf", 1),
        (listing("only-IQ2_M.gguf"), "o/r", "only-IQ2_M.gguf", 1),
        (listing("m-IQ4_KS_R4.gguf", "m-IQ4_KS.gguf"), "o/r:iq4_ks", "m-IQ4_KS.gguf", 1),
        (listing("m-int8.gguf", "m-int4.gguf"), "o/r:INT4", "m-int4.gguf", 1),
        (listing("a/m-Q8_0.gguf", "m-Q8_0.gguf"), "o/r:Q8_0", "m-Q8_0.gguf", 1),
    ],
)
def test_what_is_meant(files: list[RepoFile], ref: str, first: str, count: int) -> None:
    chosen = select(files, parse_hub_ref(ref)).shards
    assert (chosen[0].path, len(chosen)) == (first, count)
    assert chosen == select(list(reversed(files)), parse_hub_ref(ref)).shards
    if count > 1:
        numbers = [re.findall(r"-(\d{5})-of-", file.path)[0] for file in chosen]
        assert numbers == [f"{n:05d}" for n in range(1, count + 1)]


@pytest.mark.parametrize(
    ("files", "ref", "words"),
    [
        (UNSLOTH, "u/q:Q4_K_XL", "u/q has no Q4_K_XL; it has UD-IQ1_S, Q2_K, .*UD-Q4_K_XL"),
        (UNSLOTH, "u/q@v2:Q5_K_M", "u/q@v2 has no Q5_K_M; it has"),
        (UNSLOTH, "u/q:Q4_K", "has no Q4_K;"),
        (listing("m-IQ4_K_M.gguf", "m-Q4_K_M_L.gguf"), "o/r:Q4_K_M", "it has IQ4_K_M, Q4_K_M_L"),
        (listing("m-Q4_K_M-{2}.gguf")[1:], "o/r", "lacks m-Q4_K_M-00001-of-00002.gguf"),
        (listing("d/m-{4}.gguf")[::2], "o/r", "lacks d/m-00002-of-.*, d/m-00004-of-00004.gguf"),
        (listing("a-Q4_0.gguf", "b-Q4_0.gguf"), "o/r:Q4_0", "several Q4_0; .*: a-Q4_0.gguf, b-Q4"),
        (listing("a-Q4_K_M.gguf", "b-Q4_K_M.gguf"), "o/r", "several Q4_K_M; give one as o/r/PATH"),
        (listing("a-Q2_K.gguf", "b-Q3_K.gguf"), "o/r", "several models; say which: Q2_K, Q3_K"),
        (listing("a.gguf", "b.gguf"), "o/r", "several models; say which: a.gguf, b.gguf"),
        (listing("model.safetensors"), "o/r", "has no .gguf file; its weights"),
        ([], "o/r", "has no .gguf file"),
        (listing("mmproj-F16.gguf"), "o/r", "no .gguf file that is a model, only mmproj-F16.gguf"),
        (UNSLOTH_VISION, "u/v/mmproj-F16.gguf", "is a projector, not a model"),
        (MRADERMACHER, "m/m/Mixtral-8x7B.imatrix.gguf", "is an importance matrix"),
        (UNSLOTH_VISION, "u/v/none.gguf", "u/v has no none.gguf; it has Qwen3.5-4B-BF16.gguf, "),
        (listing("x-00007-of-00002.gguf"), "o/r", "no .gguf file that is a model"),
        (listing(*(f"m{n}.gguf" for n in range(30))), "o/r:Q8_0", "and 6 more"),
    ],
)
def test_what_is_refused(files: list[RepoFile], ref: str, words: str) -> None:
    with pytest.raises(BadReference, match=words):
        select(files, parse_hub_ref(ref))


@pytest.mark.parametrize(
    ("files", "ref", "candidates"),
    [
        (UNSLOTH_VISION, "u/v", ["mmproj-F16.gguf", "mmproj-BF16.gguf", "mmproj-F32.gguf"]),
        (
            GGML_ORG,
            "g/q",
            ["mmproj-Qwen2.5-VL-7B-Instruct-f16.gguf", "mmproj-Qwen2.5-VL-7B-Instruct-Q8_0.gguf"],
        ),
        (
            listing("a/m-Q8_0.gguf", "mmproj-F16.gguf", "a/mmproj-Q8_0.gguf", "b/mmproj-F16.gguf"),
            "o/r",
            ["a/mmproj-Q8_0.gguf", "mmproj-F16.gguf", "b/mmproj-F16.gguf"],
        ),
        (UNSLOTH, "u/q", []),
    ],
)
def test_projectors(files: list[RepoFile], ref: str, candidates: list[str]) -> None:
    found = select(files, parse_hub_ref(ref)).mmproj_candidates
    assert [file.path for file in found] == candidates


def test_a_projector_without_hash_is_no_candidate() -> None:
    files = [*listing("m-Q8_0.gguf"), RepoFile("mmproj-F16.gguf", 7, None)]
    assert select(files, parse_hub_ref("o/r")).mmproj_candidates == ()


def test_the_manifest_of_a_selection() -> None:
    wanted = parse_hub_ref("u/v@v2:Q4_K_M")
    manifest = to_manifest(select(UNSLOTH_VISION, wanted), wanted, COMMIT)
    assert (manifest.repo, manifest.revision, manifest.branch) == ("u/v", COMMIT, "v2")
    assert [shard.path for shard in manifest.files] == ["Qwen3.5-4B-Q4_K_M.gguf", "mmproj-F16.gguf"]
    pinned = parse_hub_ref(f"u/v@{COMMIT}")
    assert to_manifest(select(UNSLOTH_VISION, pinned), pinned, COMMIT).branch == COMMIT


def test_a_file_that_could_not_be_checked_is_refused() -> None:
    wanted = parse_hub_ref("o/r")
    with pytest.raises(HubRefused, match=r"o/r: the hub names no sha256 of m\.gguf"):
        to_manifest(Selection((RepoFile("m.gguf", 5, None),), ()), wanted, COMMIT)
    with pytest.raises(ValidationError):
        to_manifest(Selection((RepoFile("m.gguf", 0, "a" * 64),), ()), wanted, COMMIT)
    with pytest.raises(ValidationError):
        to_manifest(Selection((RepoFile("../m.gguf", 5, "a" * 64),), ()), wanted, COMMIT)


@pytest.mark.parametrize(
    ("path", "quant"),
    [
        ("Meta-Llama-3-8B-Instruct-Q6_K-f16.gguf", "Q6_K"),
        ("gemma-3-4b-it-qat-Q4_0.gguf", "Q4_0"),
        ("ggml-model-q4_k.gguf", "Q4_K"),
        ("phi-2_Q4_K_M.gguf", "Q4_K_M"),
        ("DeepSeek-V3-bf16-Q2_K.gguf", "Q2_K"),
        ("gpt-oss-20b-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("QwQ-32B-F32.gguf", "F32"),
        ("UD-Q2_K_XL/model.gguf", "UD-Q2_K_XL"),
        ("F16/m-Q8_0.gguf", "Q8_0"),
        ("QwQ-32B.gguf", None),
        ("IQtest-SQ4_0.gguf", None),
        ("Falcon-H1-7B.gguf", None),
    ],
)
def test_names_of_quantisations(path: str, quant: str | None) -> None:
    assert quant_of(path) == quant


def test_every_preferred_quantisation_is_one() -> None:
    assert all(quant_of(f"m-{quant}.gguf") == quant for quant in PREFERENCE)
    assert in_order(["Q8_0", "BF16", "Q4_K_M", "IQ4_XS", "Q8_0", "F16"]) == (
        "Q4_K_M",
        "IQ4_XS",
        "Q8_0",
        "BF16",
        "F16",
    )


@given(
    st.lists(
        st.from_regex(
            r"(a/|Q8_0/)?(m|b|mmproj)(-(Q4_0|Q4_K_M|UD-Q4_K_M|F16))?(-0000[0-3]-of-0000[1-3])?\.gguf",
            fullmatch=True,
        ),
        max_size=8,
        unique=True,
    ),
    st.sampled_from(["o/r", "o/r:Q4_0", "o/r:Q4_K_M", "o/r:F16", "o/r/a/m-00001-of-00002.gguf"]),
)
def test_any_listing_gives_a_whole_set_or_a_reason(paths: list[str], ref: str) -> None:
    wanted = parse_hub_ref(ref)
    files = listing(*paths)
    try:
        chosen = select(files, wanted)
    except BadReference:
        return
    names = [file.path for file in chosen.shards]
    assert names == sorted(names)
    assert not any("mmproj" in name for name in names)
    assert all(quant_of(name) == wanted.quant for name in names if wanted.quant)
    split = re.search(r"-of-(\d{5})\.gguf", names[0])
    assert len(names) == (int(split[1]) if split else 1)
