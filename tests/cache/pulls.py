"""A private cache, and fetch children that fill it from the local hub."""

from __future__ import annotations

import fcntl
import hashlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from meshd.cache.places import Places
from meshd.cache.transfer.words import Done, FetchOrder, News
from tests.hub import LocalHub

RUN_LIMIT_S = 60.0

_NEWS: TypeAdapter[News] = TypeAdapter(News)


class PrivateCache:
    """A Hugging Face cache and meshd's book-keeping of it, below one directory."""

    def __init__(self, home: Path, hub: LocalHub) -> None:
        self.home = home
        self.environment = hub.environment(home) | {
            "MESHD_DATA_DIR": str(home / "data"),
            "XDG_CACHE_HOME": str(home / "cache"),
        }
        ours = home / "cache" / "meshd"
        self.places = Places(home / "hub", ours / "weights", ours / "models")

    def start(self, ref: str, **more: Any) -> subprocess.Popen[bytes]:
        """A fetch child with an order for `ref`."""
        order = FetchOrder(
            ref=ref,
            hub_dir=str(self.places.hub),
            state_dir=str(self.places.state),
            builtin_dir=str(self.places.builtin),
            **more,
        )
        with (self.home.parent / f"{self.home.name}.err").open("ab") as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", "meshd.fetcher"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=self.environment,
            )
        assert child.stdin is not None
        with child.stdin as line:
            line.write(order.model_dump_json().encode() + b"\n")
        return child

    def run(self, ref: str, **more: Any) -> list[News]:
        """The news of a fetch that is left alone, to its end."""
        child = self.start(ref, **more)
        assert child.stdout is not None
        with child, child.stdout:
            return [_NEWS.validate_json(line) for line in child.stdout]

    def fetch(self, ref: str, **more: Any) -> Done:
        """Such a fetch, which succeeds."""
        last = self.run(ref, **more)[-1]
        assert isinstance(last, Done), last
        return last

    def blob(self, repo: str, content: bytes) -> Path:
        return self.places.blob(repo, hashlib.sha256(content).hexdigest())

    def hf(self, *words: str) -> str:
        """What `hf` says of this cache; fails if `hf` fails."""
        done = subprocess.run(
            [Path(sys.executable).with_name("hf"), *words],
            env={**self.environment, "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def meshd(self, *words: str) -> str:
        """What `meshd` says, with no daemon; fails if `meshd` fails."""
        done = self._run("meshd", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def doomed(self, moment: int, *words: str) -> int:
        """Let `meshd` kill itself at that moment (see `doomed`); with moment 0, how many moments it
        has."""
        done = self._run("tests.cache.doomed", str(moment), str(self.home), *words)
        if moment:
            assert done.returncode == -signal.SIGKILL, (done.returncode, done.stderr)
            return 0
        assert done.returncode == 0, done.stderr
        return int(done.stderr.splitlines()[-1])

    def _run(self, module: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_S,
        )

    def held_locks(self) -> list[Path]:
        """Locks that some process holds now."""
        return [path for path in self.places.hub.glob(".locks/**/*.lock") if _is_held(path)]


def kill(child: subprocess.Popen[bytes]) -> None:
    """SIGKILL, and everything of it is gone on return."""
    child.kill()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def _is_held(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
