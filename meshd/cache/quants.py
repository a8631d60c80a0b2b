"""Names of quantisations, as they stand in the names of GGUF files. Pure.

There is no field for it in a repository's listing: the name is all there is. `Q4_K_M`, `IQ2_XXS`,
`UD-Q4_K_XL`, `MXFP4_MOE`, `BF16` are such names; they are compared whole and in upper case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from meshd.cache.references import stem_of

PREFERENCE: Final = (
    "Q4_K_M",
    "UD-Q4_K_M",
    "UD-Q4_K_XL",
    "Q4_K_L",
    "Q4_K_S",
    "Q4_0",
    "IQ4_XS",
    "IQ4_NL",
    "MXFP4",
    "MXFP4_MOE",
    "Q5_K_M",
    "Q5_K_S",
    "Q6_K",
    "Q8_0",
    "Q3_K_M",
    "BF16",
    "F16",
    "F32",
)
"""What is taken when nobody says which: four bits in good quality first, then what is larger, since
a smaller one may be useless."""

_QUANTISED = re.compile(
    r"(?<![A-Z0-9])(?:UD-)?(?:I?Q\d|TQ\d|MXFP\d|NVFP\d)(?:_[A-Z0-9]+)*(?![A-Z0-9_])"
)
_FLOAT = re.compile(r"(?<![A-Z0-9])(?:BF16|FP?16|FP?32)(?![A-Z0-9_])")


def canonical(quant: str) -> str:
    """The one spelling of a quantisation: upper case, and `F16` for `fp16`."""
    upper = quant.upper()
    return upper.replace("FP", "F", 1) if upper in ("FP16", "FP32") else upper


def quant_of(path: str) -> str | None:
    """The quantisation of the file at `path` in its repository, None if no name says it.

    1. The file's own name counts before those of its directories, the innermost first.
    2. In a name the last one counts (`gemma-qat-Q4_0`), and a quantised one before a float:
       `Q6_K-f16` are 6 bits with 16 in a few tensors.
    """
    *directories, name = path.split("/")
    for text in (stem_of(name), *reversed(directories)):
        upper = text.upper()
        for pattern in (_QUANTISED, _FLOAT):
            if found := pattern.findall(upper):
                return canonical(found[-1])
    return None


def words_of(path: str) -> tuple[str, ...]:
    """The words of a path in upper case, cut at `-`, `.`, `/` and blanks; `_` joins."""
    *directories, name = path.split("/")
    return tuple(re.split(r"[-.\s/]+", "/".join((*directories, stem_of(name))).upper()))


def in_order(quants: Iterable[str]) -> tuple[str, ...]:
    """Distinct, as people read them: by bits, then by name; floats last."""
    return tuple(sorted(set(quants), key=_bits))


def _bits(quant: str) -> tuple[int, str, str]:
    digits = re.search(r"\d+", quant)
    plain = quant.removeprefix("UD-").lstrip("I")
    return (int(digits[0]) if digits else 99, plain, quant)
