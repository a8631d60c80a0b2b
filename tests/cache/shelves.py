"""Hugging Face caches of small files, laid out as huggingface_hub lays them out."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from meshd.cache.ledger import facts_of
from meshd.cache.manifest import Manifest, Shard
from meshd.cache.places import Places
from meshd.cache.references import HubRef
from meshd.cache.store import Store
from meshd.cache.uses import UseBook

LIMIT_S = 60.0


def commit(number: int) -> str:
    return f"{number:040x}"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Shelves:
    """A cache and what meshd knows of it, below `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.places = Places(home / "hub", home / "state", home / "builtin")
        self.store = Store.at(self.places)
        self.uses = UseBook(self.places.state / "uses")

    def add(
        self, repo: str, files: Mapping[str, bytes], *, revision: int = 1, branch: str = "main"
    ) -> None:
        """Files of a revision, as `hf download` leaves them."""
        root = self.places.repo(repo)
        for path, content in files.items():
            blob = self.places.blob(repo, sha256(content))
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link = self.places.snapshot(repo, commit(revision), path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        ref = self.places.branch(repo, branch)
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit(revision))
        (root / "trees").mkdir(exist_ok=True)
        (root / "trees" / f"{commit(revision)}.json").write_text("{}")
        (root / ".no_exist" / commit(revision)).mkdir(parents=True, exist_ok=True)

    def know(
        self,
        ref: HubRef,
        files: Mapping[str, bytes],
        *,
        revision: int = 1,
        mmproj: str | None = None,
    ) -> Manifest:
        """Remember that `ref` is those files."""
        shards = {
            path: Shard(path=path, size=len(content), sha256=sha256(content))
            for path, content in files.items()
        }
        manifest = Manifest(
            repo=ref.repo,
            revision=commit(revision),
            branch=ref.branch,
            shards=tuple(shard for path, shard in shards.items() if path != mmproj),
            mmproj=shards[mmproj] if mmproj else None,
        )
        self.store.manifests.put(ref, manifest)
        return manifest

    def verify(self, repo: str, content: bytes) -> None:
        """Remember that the blob of `content` was hashed."""
        facts = facts_of(self.places.blob(repo, sha256(content)))
        assert self.store.ledger.record(
            facts, sha256(content), read_from_ns=facts.mtime_ns + 10_000_000_000
        )

    def tree(self) -> set[str]:
        """Everything in the cache but locks: files, links and empty directories."""
        found = set()
        for place, directories, names in os.walk(self.places.hub):
            if not directories and not names:
                found.add(place)
            found.update(f"{place}/{name}" for name in names)
        return {
            os.path.relpath(path, self.places.hub)
            for path in found
            if ".locks" not in path and not path.endswith(".lock") and path != f"{self.places.hub}"
        }

    def hf(self, *words: str) -> str:
        """What `hf` says of this cache, warnings included; fails if `hf` fails."""
        done = subprocess.run(
            [Path(sys.executable).with_name("hf"), *words],
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.home),
                "HF_HUB_CACHE": str(self.places.hub),
                "HF_HUB_OFFLINE": "1",
                "NO_COLOR": "1",
            },
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr
