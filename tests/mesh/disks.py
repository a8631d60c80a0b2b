"""Caches of machines whose nodes reach no hub: what lies on each disk is chosen before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.hub import LocalHub

NO_HUB = "http://127.0.0.1:9"


class Disk:
    """The cache of one machine, for what is of one repository of `hub`."""

    def __init__(self, home: Path, hub: LocalHub, repo: str) -> None:
        self._hub = hub
        self._home = home
        self._repo = repo

    @property
    def places(self) -> dict[str, str]:
        return {
            "HF_HOME": str(self._home / "hf"),
            "HF_HUB_CACHE": str(self._home / "hf" / "hub"),
            "XDG_CACHE_HOME": str(self._home / "cache"),
        }

    @property
    def blobs(self) -> Path:
        return self._home / "hf" / "hub" / f"models--{self._repo.replace('/', '--')}" / "blobs"

    @property
    def environ(self) -> dict[str, Any]:
        """For a node: no hub."""
        return {**self.places, "HF_ENDPOINT": NO_HUB, "HF_HUB_DISABLE_XET": "1"}

    def fill(self, ref: str) -> None:
        """Pull it from the hub."""
        self._run(sys.executable, "-m", "meshd", "cache", "pull", ref)

    def hf(self, *words: str) -> str:
        """What huggingface_hub's own command says of this cache, beside the hub."""
        return self._run(str(Path(sys.executable).with_name("hf")), *words)

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.blobs.iterdir()}

    def _run(self, *command: str) -> str:
        environ = {**self._hub.environment(self._home / "hf"), **self.places, "NO_COLOR": "1"}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout
