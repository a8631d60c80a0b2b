"""What each worker of a split needs of the weights, as its host tells it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from meshd.ids import NodeId
from meshd.runtime.lending.extents import TensorExtent, held_by, offered_by_hash
from meshd.view import MAX_NEEDED_FILES, NeededWeights, Part


def needs(
    parts: Sequence[Part],
    ref: str,
    tensors: Sequence[TensorExtent],
    files: Mapping[str, tuple[str, int]],
    *,
    holders: Collection[NodeId],
    bytes_per_s: Mapping[NodeId, float],
) -> Mapping[NodeId, NeededWeights]:
    """By worker; those are left out that need nothing or too many files.

    `tensors`: of the whole model; `files`: sha256 and bytes by path, in order; `holders`: nodes
    that say they hold the weights; `bytes_per_s`: what the host could send to each.
    """
    held = {part.node: held_by(part, tensors) for part in parts}
    sizes = {node: sum(t.size for t in offered_by_hash(own)) for node, own in held.items()}
    pushed = {node: size for node, size in sizes.items() if size and node not in holders}
    found = {}
    for node, own in held.items():
        paths = {tensor.path for tensor in own}
        lie_in = tuple(facts for path, facts in files.items() if path in paths)
        if not sizes[node] or len(lie_in) > MAX_NEEDED_FILES:
            continue
        found[node] = NeededWeights(
            ref=ref,
            files=lie_in,
            bytes=sizes[node],
            pushed_bytes=sum(pushed.values()),
            pushed_to=len(pushed),
            bytes_per_s=bytes_per_s.get(node),
        )
    return found
