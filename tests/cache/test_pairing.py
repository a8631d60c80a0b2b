"""Which projector goes with which model."""

from __future__ import annotations

from typing import Any

import pytest

from meshd.cache.gguf_header import GgufHeader, TensorInfo
from meshd.cache.pairing import best_pair, pairs, projectors_for


def header(architecture: str, tensors: dict[str, tuple[int, ...]], **metadata: Any) -> GgufHeader:
    facts = {key.replace("__", "."): value for key, value in metadata.items()}
    infos = tuple(TensorInfo(name, shape, "F16", 64, 2) for name, shape in tensors.items())
    return GgufHeader(3, {"general.architecture": architecture, **facts}, infos, 32, 64)


GEMMA_12B = header("gemma3", {}, gemma3__embedding_length=3840, general__basename="Gemma-3")
GEMMA_27B = header("gemma3", {}, gemma3__embedding_length=5376, general__basename="Gemma-3")
VICUNA = header("llama", {}, llama__embedding_length=4096)

FOR_12B = header("clip", {}, clip__vision__projection_dim=3840, general__basename="gemma-3")
FOR_27B = header("clip", {}, clip__vision__projection_dim=5376)
FOR_ULTRAVOX = header("clip", {}, clip__audio__projection_dim=4096)
FOR_OMNI = header("clip", {}, clip__vision__projection_dim=3584, clip__audio__projection_dim=3584)
# As converted in 2023: projection_dim is CLIP's own.
LLAVA = header(
    "clip",
    {"mm.0.weight": (1024, 4096), "mm.2.weight": (4096, 4096), "v.patch_embd.weight": (14, 1024)},
    clip__vision__projection_dim=768,
)
MINICPM = header("clip", {"resampler.proj.weight": (3584, 3584)}, clip__vision__projection_dim=0)


@pytest.mark.parametrize(
    ("model", "projector"),
    [
        (GEMMA_12B, FOR_12B),
        (GEMMA_27B, FOR_27B),
        (VICUNA, FOR_ULTRAVOX),
        (VICUNA, LLAVA),
        (header("qwen2", {}, qwen2__embedding_length=3584), FOR_OMNI),
        (header("qwen2", {}, qwen2__embedding_length=3584), MINICPM),
    ],
)
def test_what_fits(model: GgufHeader, projector: GgufHeader) -> None:
    assert pairs(model, projector) is None


@pytest.mark.parametrize(
    ("model", "projector", "words"),
    [
        (GEMMA_12B, FOR_27B, "makes vectors of 5376 numbers, this one takes 3840"),
        (GEMMA_27B, LLAVA, "makes vectors of 768 numbers, this one takes 5376"),
        (GEMMA_27B, MINICPM, "makes vectors of other numbers"),
        (GEMMA_27B, FOR_OMNI, "of 3584 and 3584 numbers"),
        (GEMMA_27B, GEMMA_12B, "is no projector: its architecture is gemma3"),
        (GEMMA_27B, header("", {}), "its architecture is not named"),
        (header("gemma3", {}), FOR_27B, "names no gemma3.embedding_length"),
        # The tower is 14 wide at its entry; only what leaves it counts.
        (header("x", {}, x__embedding_length=14), LLAVA, "this one takes 14"),
    ],
)
def test_what_does_not_fit(model: GgufHeader, projector: GgufHeader, words: str) -> None:
    why = pairs(model, projector)
    assert why is not None
    assert words in why


def test_the_best_of_several() -> None:
    assert best_pair(GEMMA_12B, {"a-F16": FOR_27B, "b-F32": FOR_12B, "c": VICUNA}) == "b-F32"
    assert best_pair(GEMMA_12B, {"a": FOR_27B}) is None
    assert best_pair(GEMMA_12B, {}) is None
    plain = header("clip", {}, clip__vision__projection_dim=3840)
    other = header("clip", {}, clip__vision__projection_dim=3840, general__basename="Other")
    assert best_pair(GEMMA_12B, {"m-Q8_0": plain, "m-BF16": plain, "m-F32": plain}) == "m-BF16"
    assert best_pair(GEMMA_12B, {"m-F16": other, "m-Q8_0": FOR_12B}) == "m-Q8_0"


def test_the_base_model_decides_before_the_name() -> None:
    base = "general__base_model__0__repo_url"
    model = header("a", {}, a__embedding_length=64, **{base: "u/one", "general__basename": "X"})
    same = header("clip", {}, clip__vision__projection_dim=64, **{base: "U/ONE"})
    named = header(
        "clip", {}, clip__vision__projection_dim=64, **{base: "u/two", "general__basename": "X"}
    )
    assert best_pair(model, {"a-F16": named, "b-Q8_0": same}) == "b-Q8_0"


@pytest.mark.parametrize(
    ("model", "projectors"),
    [
        (
            "m-Q4_0.gguf",
            ["mmproj-f16.gguf", "mmproj-bf16.gguf", "mmproj-f32.gguf", "mmproj-x.gguf"],
        ),
        ("m.gguf", ["mmproj-F16.gguf", "mmproj-Q8_0.gguf", "mmproj-Q4_0.gguf"]),
        (
            "a/b/m.gguf",
            ["a/b/mmproj-Q8_0.gguf", "a/mmproj-F16.gguf", "mmproj-F16.gguf", "c/mmproj.gguf"],
        ),
        ("ab/m.gguf", ["mmproj-Q8_0.gguf", "a/mmproj-F16.gguf"]),
        (
            "Qwen2.5-VL-7B-Instruct-Q4_K_M.gguf",
            [
                "mmproj-Qwen2.5-VL-7B-Instruct-Q8_0.gguf",
                "mmproj-Qwen2.5-VL-3B-Instruct-F16.gguf",
            ],
        ),
        ("x-fp16.gguf", ["mmproj-x-fp16.gguf", "mmproj-x-q8_0.gguf"]),
    ],
)
def test_the_order_by_name(model: str, projectors: list[str]) -> None:
    assert list(projectors_for(model, projectors[::-1])) == projectors
