"""Which projector (mmproj: the part that reads images or sound) belongs to which model. Pure.

Before anything is downloaded the listing decides (`projectors_for`); once headers are there, they
do (`pairs`, `best_pair`). A projector writes vectors into the model's embedding, so its output must
be as wide. `clip.*.projection_dim` says how wide, but older converters put the width of the vision
tower's own projection there; then the tensors behind the tower tell, as they do for the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from meshd.cache.gguf_header import GgufHeader
from meshd.cache.quants import canonical, quant_of, words_of

PREFERENCE: Final = ("F16", "BF16", "F32", "Q8_0")
"""F16 is fast everywhere; BF16 is emulated on older devices, F32 only costs memory."""

ARCHITECTURE: Final = "clip"
_WIDTHS: Final = ("clip.vision.projection_dim", "clip.audio.projection_dim")
_OUTPUTS: Final = ("mm.", "resampler.")
"""First letters of the tensors behind the tower."""
_IDENTITY: Final = ("general.base_model.0.repo_url", "general.basename")
_OF_NO_MODEL: Final = frozenset({"MMPROJ", "MODEL", "GGUF", "GGML", "VISION", "AUDIO", ""})


def projectors_for(model: str, projectors: Sequence[str]) -> tuple[str, ...]:
    """Paths of `projectors`, the likeliest one for the model at path `model` first:

    1. in the model's directory, then in one above it, the nearest first, then elsewhere;
    2. with no word in its name that the model's has not (`mmproj-other-7B-F16`);
    3. by `PREFERENCE`, then by name.
    """
    directory = model.rpartition("/")[0]
    own_words = {*words_of(model), *_OF_NO_MODEL}

    def rank(path: str) -> tuple[int, bool, int, str]:
        words = {canonical(word) for word in words_of(path.rpartition("/")[2])} - {quant_of(path)}
        return (
            _distance(directory, path.rpartition("/")[0]),
            not words <= own_words,
            _preference(path),
            path,
        )

    return tuple(sorted(projectors, key=rank))


def pairs(model: GgufHeader, projector: GgufHeader) -> str | None:
    """None if the two fit, else why not, in words to follow the projector's name."""
    if projector.architecture != ARCHITECTURE:
        return f"is no projector: its architecture is {projector.architecture or 'not named'}"
    width = model.integer(f"{model.architecture}.embedding_length")
    if width is None:
        return f"cannot be matched: the model names no {model.architecture}.embedding_length"
    named = [found for key in _WIDTHS if (found := projector.integer(key))]
    if width in named or width in _output_widths(projector):
        return None
    said = " and ".join(str(found) for found in named) or "other"
    return f"belongs to another model: it makes vectors of {said} numbers, this one takes {width}"


def best_pair(model: GgufHeader, projectors: Mapping[str, GgufHeader]) -> str | None:
    """The path among `projectors` of the one to use with `model`, None if none fits.

    Of several that fit, one that names the same base model comes first, then `PREFERENCE`.
    """
    fitting = [path for path, header in projectors.items() if pairs(model, header) is None]
    return min(
        fitting,
        key=lambda path: (not _same_base(model, projectors[path]), _preference(path), path),
        default=None,
    )


def _distance(directory: str, other: str) -> int:
    """0: the same; n: n levels up; a thousand: neither."""
    if other == directory:
        return 0
    if other and not directory.startswith(f"{other}/"):
        return 1000
    return directory.count("/") - other.count("/") + (not other)


def _preference(path: str) -> int:
    quant = quant_of(path)
    return PREFERENCE.index(quant) if quant in PREFERENCE else len(PREFERENCE)


def _output_widths(projector: GgufHeader) -> frozenset[int]:
    return frozenset(
        dimension
        for tensor in projector.tensors
        if tensor.name.startswith(_OUTPUTS)
        for dimension in tensor.dimensions
    )


def _same_base(model: GgufHeader, projector: GgufHeader) -> bool:
    """Both name one base, and it is the same."""
    for key in _IDENTITY:
        own, other = model.text(key), projector.text(key)
        if own and other:
            return own.casefold() == other.casefold()
    return False
