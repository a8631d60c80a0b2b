"""What is given up, in order and in words."""

from __future__ import annotations

from dataclasses import replace

from meshd.ids import ModelId
from meshd.runtime.degrade import MIN_CONTEXT, given_up, next_rung
from meshd.runtime.launch import LaunchSpec

ASKED = LaunchSpec(
    ModelId("m"), "/m.gguf", context=6000, parallel=4, gpu_layers=5, kv_type="q8_0", threads=3
)


def test_the_ladder_from_top_to_bottom() -> None:
    spec, words = ASKED, []
    while (rung := next_rung(spec)) is not None:
        spec = rung.spec
        words.append(rung.words)
    assert words == [
        "a context of 3000 tokens",
        f"a context of {MIN_CONTEXT} tokens",
        "a KV cache of type f16",
        "one request at a time",
        "2 layers on the device",
        "1 layers on the device",
        "0 layers on the device",
    ]
    assert spec == replace(ASKED, context=MIN_CONTEXT, kv_type=None, parallel=1, gpu_layers=0)
    assert given_up(ASKED, spec) == (
        "context of 2048 instead of 6000 tokens, KV cache of type f16 instead of q8_0, "
        "1 instead of 4 requests at a time, 0 instead of 5 layers on the device"
    )


def test_what_is_small_already_has_no_rung() -> None:
    smallest = LaunchSpec(ModelId("m"), "/m.gguf", context=512, parallel=1)
    assert next_rung(smallest) is None
    assert next_rung(replace(smallest, kv_type="f16", gpu_layers=0)) is None


def test_nothing_given_up_needs_no_words() -> None:
    assert given_up(ASKED, ASKED) is None
