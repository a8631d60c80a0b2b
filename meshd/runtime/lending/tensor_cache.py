"""What RPC servers have kept of models' tensors on this disk: whole, private, and bounded.

One directory a set of weights, below one root:

    <digest>/rpc/<16 hexadecimal digits>   the bytes of one tensor, written by an RPC server and
                                           named by their FNV-1a hash
    <digest>/kept.json                     which of those files are known to be whole

An RPC server believes a file by its name: it reads what is there and never hashes it again. One
that was killed while it wrote, or ran out of disk, leaves a file that would put wrong weights into
the next load, silently. So files are written down as whole when it is known that they are, with
size and time, and what is not written down is removed before a server starts on the directory.

Everything here blocks; call it through a pool.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from meshd.errors import BadReference
from meshd.kernel.files import write_atomic
from meshd.runtime.lending.extents import TensorExtent

log = logging.getLogger(__name__)

SPARE_BYTES = 1 << 30
"""A disk with less than this to spare may have cut a file short."""
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class KeptFile:
    size: int
    mtime_ns: int


Kept = Mapping[str, KeptFile]
"""Files of a cache by name."""


class TensorCaches:
    """All caches of this node, in `root`; together at most `limit_bytes` after `prune`."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root = root
        self._limit_bytes = limit_bytes

    def directory(self, digest: str, needed_bytes: int) -> TensorCache | None:
        """The cache for weights of that digest, in which `needed_bytes` are to find room; made if
        there is none, and cleared of what may not be whole: no server may run on it. None if the
        room is not there: a server without a cache loads all the same.

        Raises BadReference if `digest` is no SHA-256, OSError if the disk refuses.
        """
        name = _name(digest)
        path = self._root / name
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        os.utime(path)  # it was used now
        cache = TensorCache(path)
        cache.clear_doubtful()
        missing = max(0, needed_bytes - sum(f.size for f in cache.files().values()))
        if needed_bytes > self._limit_bytes or (missing and not _has_room(path, missing)):
            return None
        return cache

    def prune(self, in_use: Collection[str]) -> int:
        """Remove whole caches, those longest unused first and none of a digest `in_use`, until what
        is left keeps within the limit. Returns the bytes that were freed."""
        used = {_name(digest) for digest in in_use}
        caches = [TensorCache(path) for path in self._directories()]
        sizes = {cache.path: sum(f.size for f in cache.files().values()) for cache in caches}
        excess, freed = sum(sizes.values()) - self._limit_bytes, 0
        for path in sorted(sizes, key=lambda p: p.stat().st_mtime_ns):
            if freed >= excess:
                break
            if path.name in used:
                continue
            log.info("removing cached tensors of %.12s, %d bytes", path.name, sizes[path])
            shutil.rmtree(path, ignore_errors=True)
            freed += sizes[path]
        return freed

    def _directories(self) -> list[Path]:
        if not self._root.is_dir():
            return []
        return [p for p in self._root.iterdir() if p.is_dir() and _DIGEST.fullmatch(p.name)]


class TensorCache:
    """One directory. `path` is what the RPC server is to get as LLAMA_CACHE."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files_dir = path / "rpc"
        self._index_path = path / "kept.json"

    def files(self) -> Kept:
        """What lies there now, whole or not."""
        found = {}
        if self._files_dir.is_dir():
            with os.scandir(self._files_dir) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    found[entry.name] = KeptFile(status.st_size, status.st_mtime_ns)
        return found

    def lacking(self, tensors: Sequence[TensorExtent], protocol: str) -> tuple[TensorExtent, ...]:
        """Those of `tensors` that were not kept by a server of `protocol`, or whose file has since
        been touched."""
        index, files = self._index(), self.files()
        whole = {name for name, kept in index.whole().items() if files.get(name) == kept}
        names = {
            tensor
            for tensor, file in index.tensors.items()
            if index.protocol == protocol and file in whole
        }
        return tuple(t for t in tensors if t.name not in names)

    def keep_tensor(self, tensor: TensorExtent, before: Kept) -> str | None:
        """Name of the file a server has made of `tensor` since `before` was taken; None if that
        cannot be told. Raises OSError, and removes the file, if it is not whole."""
        changed = {n: f for n, f in self.files().items() if before.get(n) != f}
        if len(changed) != 1:
            return None
        ((name, file),) = changed.items()
        if file.size != tensor.size:
            (self._files_dir / name).unlink(missing_ok=True)
            raise OSError(
                f"of {tensor.name} {file.size} bytes were kept, not {tensor.size}; is the disk "
                f"under {self.path} full?"
            )
        return name

    def write_down(self, tensors: Mapping[str, str], protocol: str) -> None:
        """Remember that `tensors` lie whole in the files named. Raises OSError."""
        index, files = self._index(), self.files()
        known = index.tensors if index.protocol == protocol else {}
        whole = {n: f for n, f in index.whole().items() if files.get(n) == f}
        whole |= {name: files[name] for name in tensors.values() if name in files}
        self._write(_Index.of(protocol, whole, {**known, **tensors}))

    def measure(self, before: Kept, *, whole: bool) -> int:
        """Bytes of tensors that were pushed since `before` was taken. `whole`: the server was at
        rest since, so they are not cut short, and are written down as such."""
        index, files = self._index(), self.files()
        new = {name: file for name, file in files.items() if before.get(name) != file}
        if whole and new and _has_room(self.path, 0):
            known = {n: f for n, f in index.whole().items() if files.get(n) == f}
            try:
                self._write(_Index.of(index.protocol, {**known, **new}, index.tensors))
            except OSError as error:  # they are pushed again next time
                log.warning("cannot write down what %s holds: %s", self.path, error)
        return sum(file.size for file in new.values())

    def clear_doubtful(self) -> None:
        """Remove the files that are not known to be whole. No server may run on the directory."""
        whole = self._index().whole()
        for name, file in self.files().items():
            if whole.get(name) != file:
                log.info("removing a cached tensor that may not be whole: %s", name)
                (self._files_dir / name).unlink(missing_ok=True)

    def _index(self) -> _Index:
        try:
            return _Index.model_validate_json(self._index_path.read_bytes())
        except (OSError, ValidationError):
            return _Index()

    def _write(self, index: _Index) -> None:
        write_atomic(self._index_path, index.model_dump_json().encode())


class _Index(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    protocol: str = ""
    """Of the server that named the files of `tensors`."""
    files: dict[str, tuple[int, int]] = {}
    """Size and time (ns) of those known to be whole."""
    tensors: dict[str, str] = {}
    """Which file a tensor of these weights lies in, of those that were warmed."""

    @classmethod
    def of(cls, protocol: str, files: Kept, tensors: Mapping[str, str]) -> _Index:
        pairs = {name: (file.size, file.mtime_ns) for name, file in files.items()}
        return cls(protocol=protocol, files=pairs, tensors=dict(tensors))

    def whole(self) -> dict[str, KeptFile]:
        return {name: KeptFile(*facts) for name, facts in self.files.items()}


def _name(digest: str) -> str:
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise BadReference(f"{digest[:80]!r} is no SHA-256 of weights")
    return match[1]


def _has_room(path: Path, needed_bytes: int) -> bool:
    return shutil.disk_usage(path).free >= needed_bytes + SPARE_BYTES
