"""llama.cpp's source: pinned, fetched, checked, unpacked.

By default the source distribution of `llama-cpp-python`, which holds llama.cpp whole. It is
fetched with pip, so that the user's index, proxy and certificates apply (docs/adr/0003).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from meshd.config import environment_of_children
from meshd.errors import BuildFailed, SourceRejected
from meshd.runtime.probe import sha256_of

FETCH_LIMIT_S = 1800.0
MARKER = "CMakeLists.txt"


@dataclass(frozen=True, slots=True)
class PinnedSource:
    """A source distribution on the Python package index."""

    package: str
    version: str
    sha256: str
    commit: str
    """llama.cpp's."""
    inner: str
    """Where llama.cpp lies in the archive."""

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


PINNED = PinnedSource(
    package="llama-cpp-python",
    version="0.3.36",
    sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    commit="0c1e570",
    inner="vendor/llama.cpp",
)

_UNNEEDED = ("models", "docs", "media", "tests", ".git", ".github", ".devops")
"""Top-level folders of llama.cpp that no build of ours reads."""


@dataclass(frozen=True, slots=True)
class Source:
    """An unpacked tree that can be built."""

    directory: Path
    name: str
    """What it is, for people and the record."""
    sha256: str | None
    """Of the archive; None for a directory of the user's own."""
    commit: str


def obtain(source: str | None, sources_dir: Path, pinned: PinnedSource = PINNED) -> Source:
    """The tree to build: the pinned one, or what `source` names.

    `source`: a directory, a tarball, or `git+URL@TAG`. Blocking. What was fetched or unpacked
    before is used again. Raises SourceRejected (not what it should be) or BuildFailed.
    """
    sources_dir.mkdir(parents=True, exist_ok=True)
    if source is None:
        archive = _fetch(pinned, sources_dir)
        tree = _unpack(archive, pinned.sha256, pinned.inner, sources_dir)
        return Source(tree, pinned.requirement, pinned.sha256, pinned.commit)
    if source.startswith("git+"):
        return _clone(source, sources_dir)
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        if not (path / MARKER).is_file():
            raise SourceRejected(f"{path} has no {MARKER}: it is not llama.cpp's source")
        return Source(path, str(path), None, _commit_of(path))
    if path.is_file():
        digest = sha256_of(path)
        tree = _unpack(path, digest, "", sources_dir)
        return Source(tree, str(path), digest, digest[:7])
    raise SourceRejected(f"--source {source}: no such file or directory")


def _fetch(pinned: PinnedSource, sources_dir: Path) -> Path:
    target = sources_dir / f"{pinned.package}-{pinned.version}.tar.gz"
    if target.is_file() and sha256_of(target) == pinned.sha256:
        return target
    with tempfile.TemporaryDirectory(dir=sources_dir, prefix=".fetch-") as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"{pinned.requirement} --hash=sha256:{pinned.sha256}\n")
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-binary", pinned.package, "--require-hashes"),
            *("--dest", temporary, "--requirement", str(requirements)),
        ]
        done = _run(command, Path(temporary))
        found = list(Path(temporary).glob("*.tar.gz"))
        if done.returncode != 0 or not found:
            words = [x for x in done.stderr.splitlines() if "ERROR" in x.upper()]
            raise BuildFailed(
                f"{pinned.requirement} could not be fetched with pip: "
                f"{(words or done.stderr.splitlines() or ['no output'])[-1].strip()}; without "
                "a network give the source yourself: --source FILE.tar.gz or DIRECTORY"
            )
        digest = sha256_of(found[0])
        if digest != pinned.sha256:
            raise SourceRejected(
                f"{found[0].name} has sha256 {digest}, pinned is {pinned.sha256}: it is not the "
                "source meshd was made for"
            )
        found[0].replace(target)
    return target


def _unpack(archive: Path, digest: str, inner: str, sources_dir: Path) -> Path:
    """Unpack llama.cpp out of `archive`; an interrupted unpacking leaves nothing that counts."""
    target = sources_dir / f"tree-{digest[:16]}"
    if (target / MARKER).is_file():
        return target
    temporary = Path(tempfile.mkdtemp(dir=sources_dir, prefix=".unpack-"))
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                kept = _kept_name(member.name, inner)
                if kept is not None and (member.isfile() or member.isdir()):
                    tar.extract(member.replace(name=kept, deep=False), temporary, filter="data")
        if not (temporary / MARKER).is_file():
            raise SourceRejected(f"{archive} has no {MARKER}: it does not hold llama.cpp")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except (tarfile.TarError, EOFError) as error:
        raise SourceRejected(f"{archive} cannot be unpacked: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _kept_name(name: str, inner: str) -> str | None:
    """Path below llama.cpp's root for an archive member; None if it is not needed."""
    _, _, below = name.partition("/")  # every archive has one top folder
    if inner:
        if not below.startswith(f"{inner}/"):
            return None
        below = below.removeprefix(f"{inner}/")
    if not below or below.split("/")[0] in _UNNEEDED or below.endswith(".gguf"):
        return None
    return below


def _clone(source: str, sources_dir: Path) -> Source:
    match = re.fullmatch(r"git\+(?P<url>.+?)(?:@(?P<tag>[\w./-]+))?", source)
    assert match is not None, "source starts with git+"
    url, tag = match["url"], match["tag"]
    if tag is None:
        raise SourceRejected(f"--source {source}: name a tag, as in git+URL@TAG")
    target = sources_dir / f"git-{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    if not (target / MARKER).is_file():
        shutil.rmtree(target, ignore_errors=True)
        done = _run(
            ["git", "clone", "--quiet", "--depth", "1", "--branch", tag, url, str(target)],
            sources_dir,
        )
        if done.returncode != 0:
            shutil.rmtree(target, ignore_errors=True)
            words = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise BuildFailed(f"{url} at {tag} could not be cloned: {words}")
    return Source(target, source, None, _commit_of(target))


def _commit_of(tree: Path) -> str:
    done = _run(["git", "-C", str(tree), "rev-parse", "--short=7", "HEAD"], tree)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=FETCH_LIMIT_S,
            stdin=subprocess.DEVNULL,
            env=environment_of_children(),
            check=False,
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    except subprocess.TimeoutExpired:
        words = f"{command[0]} took more than {FETCH_LIMIT_S:.0f} s"
        return subprocess.CompletedProcess(command, 124, "", words)
