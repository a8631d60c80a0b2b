"""Where weights and what is known of them lie. Names paths, touches nothing.

Weights lie in the ordinary Hugging Face cache, laid out as huggingface_hub does:

    <hub>/models--owner--name/blobs/<sha256>                 the bytes
                              blobs/<sha256>.meshd.incomplete  a fetch that goes on
                              snapshots/<commit>/<path>      relative link to the blob
                              refs/<branch>                  the commit's hash
    <hub>/.locks/models--owner--name/<sha256>.lock           held by whoever writes the blob

Beside it, in `state`, what meshd knows of them: manifests, the ledger of hashes, chunk hashes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

OWN_PARTIAL: Final = ".meshd.incomplete"


@dataclass(frozen=True, slots=True)
class Places:
    hub: Path
    """`HF_HUB_CACHE`."""
    state: Path
    """meshd's own book-keeping; can be deleted, and is then made again by hashing."""
    builtin: Path
    """Where the built-in model is made."""

    def repo(self, repo: str) -> Path:
        return self.hub / ("models--" + repo.replace("/", "--"))

    def blob(self, repo: str, sha256: str) -> Path:
        return self.repo(repo) / "blobs" / sha256

    def partial(self, repo: str, sha256: str) -> Path:
        """A blob that is being fetched. Its full size from the start, with holes; what of it is
        there says its journal. Not `<sha256>.incomplete`: older huggingface_hubs go on with that
        at its end, and would take holes for a finished download."""
        return self.repo(repo) / "blobs" / f"{sha256}{OWN_PARTIAL}"

    def snapshot(self, repo: str, revision: str, path: str = "") -> Path:
        return self.repo(repo) / "snapshots" / revision / path

    def branch(self, repo: str, branch: str) -> Path:
        return self.repo(repo) / "refs" / branch

    def lock(self, repo: str, sha256: str) -> Path:
        return self.hub / ".locks" / self.repo(repo).name / f"{sha256}.lock"

    @property
    def manifests(self) -> Path:
        return self.state / "manifests"

    @property
    def ledger(self) -> Path:
        return self.state / "ledger"

    @property
    def headers(self) -> Path:
        """Where long arrays in headers end."""
        return self.state / "headers"

    def chunk_hashes(self, sha256: str) -> Path:
        """The sha256 of every chunk of the file with that sha256, 32 bytes each, in order."""
        return self.state / "chunks" / sha256

    @property
    def removals(self) -> Path:
        """Orders to remove sets that are not carried out yet."""
        return self.state / "removals"

    def journal(self, sha256: str) -> Path:
        """Which chunks of a partial are there."""
        return self.state / "partials" / sha256
