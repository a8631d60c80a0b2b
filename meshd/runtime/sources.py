"""llama.cpp's source: pinned, fetched, checked, unpacked.

By default the source distribution of `llama-cpp-python`, which holds llama.cpp whole. It is
fetched with pip, so that the user's index, proxy and certificates apply (docs/adr/0003).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import importlib.util
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from meshd.config import environment_of_children
from meshd.errors import BuildFailed, NoSpace, SourceRejected
from meshd.runtime.probe import sha256_of

FETCH_LIMIT_S = 1800.0
MARKER = Path("ggml", "include", "ggml-rpc.h")
"""A file that llama.cpp has and that packages around llama.cpp have only further down."""


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
_SCRATCH = ".scratch-"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNREADABLE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


@dataclass(frozen=True, slots=True)
class Source:
    """An unpacked tree that can be built."""

    directory: Path
    name: str
    """What it is, for people and the record."""
    sha256: str
    """Of the archive, or over the files of a directory or a clone."""
    commit: str
    """llama.cpp's, seven digits; `unknown` where nothing tells."""


def obtain(source: str | None, sources_dir: Path, pinned: PinnedSource = PINNED) -> Source:
    """The tree to build: the pinned one, or what `source` names.

    `source`: a directory, a tarball, or `git+URL@TAG`. Blocking. What was fetched or unpacked
    before is used again. The archive given as `source` may be the pinned one, got by hand.
    Raises SourceRejected (not what it should be) or BuildFailed.
    """
    sources_dir.mkdir(parents=True, exist_ok=True)
    with _alone(sources_dir):
        if source is None:
            return _pinned_tree(_fetch(pinned, sources_dir), pinned, sources_dir)
        if source.startswith("git+"):
            return _clone(source, sources_dir)
        path = Path(source).expanduser().absolute()
        if path.is_dir():
            if not (path / MARKER).is_file():
                raise SourceRejected(f"{path} has no {MARKER}: it is not llama.cpp's source")
            return Source(path, str(path), tree_sha256(path), _commit_of(path))
        if not path.is_file():
            raise SourceRejected(f"--source {source}: no such file or directory")
        digest = sha256_of(path)
        if digest == pinned.sha256:
            return _pinned_tree(path, pinned, sources_dir)
        inner, commit = _look_into(path)
        return Source(_unpack(path, digest, inner, sources_dir), str(path), digest, commit)


def tree_sha256(directory: Path) -> str:
    """Over names and contents of the files a build reads: a changed tree is another source."""
    total = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        below = path.relative_to(directory)
        top = below.parts[0]
        if _needed(below.as_posix()) and not top.startswith((".", "build")) and path.is_file():
            total.update(f"{below.as_posix()}\0{sha256_of(path)}\n".encode())
    return total.hexdigest()


@contextlib.contextmanager
def _alone(sources_dir: Path) -> Iterator[None]:
    """One at a time: what somebody else fetches or unpacks is waited for, then used."""
    with (sources_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left_over in sources_dir.glob(f"{_SCRATCH}*"):  # of one that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        yield


def _pinned_tree(archive: Path, pinned: PinnedSource, sources_dir: Path) -> Source:
    inner = f"{_top_of(archive)}/{pinned.inner}"
    tree = _unpack(archive, pinned.sha256, inner, sources_dir)
    return Source(tree, pinned.requirement, pinned.sha256, pinned.commit)


def _fetch(pinned: PinnedSource, sources_dir: Path) -> Path:
    target = sources_dir / f"{pinned.package}-{pinned.version}.tar.gz"
    if target.is_file() and sha256_of(target) == pinned.sha256:
        return target
    if importlib.util.find_spec("pip") is None:
        raise BuildFailed(
            f"{sys.executable} has no pip to fetch {pinned.requirement} with; "
            f"`{sys.executable} -m ensurepip` installs it, or give the source yourself: "
            "--source FILE.tar.gz or DIRECTORY"
        )
    with tempfile.TemporaryDirectory(dir=sources_dir, prefix=_SCRATCH) as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"{pinned.requirement} --hash=sha256:{pinned.sha256}\n")
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-binary", pinned.package, "--require-hashes"),
            *("--dest", temporary, "--requirement", str(requirements)),
        ]
        done = _run(command, Path(temporary))
        found = list(Path(temporary).glob("*.tar.gz"))
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise SourceRejected(
                f"the index gave a {pinned.requirement} that has not the pinned sha256 "
                f"{pinned.sha256}: it is not the source meshd was made for"
            )
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
    """Unpack what lies below `inner`; an interrupted unpacking leaves nothing that counts."""
    target = sources_dir / f"tree-{digest[:16]}"
    if _sealed(target) is not None:
        return target
    temporary = Path(tempfile.mkdtemp(dir=sources_dir, prefix=_SCRATCH))
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                kept = _kept_name(member.name, inner)
                # Links are left out: llama.cpp builds without any.
                if kept is not None and (member.isfile() or member.isdir()):
                    tar.extract(member.replace(name=kept, deep=False), temporary, filter="data")
        if not (temporary / MARKER).is_file():
            raise SourceRejected(f"{archive} has no {MARKER} where it should be")
        _seal(temporary, target)
    except _UNREADABLE as error:
        raise SourceRejected(f"{archive} cannot be unpacked: {error}") from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise NoSpace(f"no space on the disk of {sources_dir} to unpack the source") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _kept_name(name: str, inner: str) -> str | None:
    """Path below llama.cpp's root `inner` for an archive member; None if it is not needed."""
    name = PurePosixPath(name).as_posix()  # `./a/b` is `a/b`
    if inner:
        if not name.startswith(f"{inner}/"):
            return None
        name = name.removeprefix(f"{inner}/")
    return name if _needed(name) else None


def _needed(below: str) -> bool:
    return below.split("/", maxsplit=1)[0] not in (*_UNNEEDED, ".") and not below.endswith(".gguf")


def _top_of(archive: Path) -> str:
    try:
        with tarfile.open(archive) as tar:
            first = next(iter(tar), None)
    except _UNREADABLE as error:
        raise SourceRejected(f"{archive} cannot be read: {error}") from None
    return PurePosixPath(first.name).parts[0] if first is not None else ""


def _look_into(archive: Path) -> tuple[str, str]:
    """(llama.cpp's root in `archive`, its commit if the archive tells). Reads all of it."""
    try:
        with tarfile.open(archive) as tar:
            names = [PurePosixPath(member.name) for member in tar]
            comment = tar.pax_headers.get("comment", "")  # `git archive` leaves the commit there
    except _UNREADABLE as error:
        raise SourceRejected(f"{archive} is not a tar archive that can be read: {error}") from None
    marker = PurePosixPath(MARKER.as_posix())
    up = len(marker.parts) - 1
    roots = [
        n.parents[up].as_posix() for n in names if n.parts[-len(marker.parts) :] == marker.parts
    ]
    if not roots:
        raise SourceRejected(f"{archive} has no {MARKER}: it does not hold llama.cpp")
    root = min(roots, key=len)
    return ("" if root == "." else root), comment[:7] if _COMMIT.fullmatch(comment) else "unknown"


def _clone(source: str, sources_dir: Path) -> Source:
    match = re.fullmatch(r"git\+(?P<url>.+?)(?:@(?P<tag>[\w./-]+))?", source)
    assert match is not None, "source starts with git+"
    url, tag = match["url"], match["tag"]
    if tag is None:
        raise SourceRejected(f"--source {source}: name a tag, as in git+URL@TAG")
    target = sources_dir / f"git-{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    digest = _sealed(target)
    if digest is None:
        with tempfile.TemporaryDirectory(dir=sources_dir, prefix=_SCRATCH) as temporary:
            tree = Path(temporary) / "tree"
            command = [*("git", "clone", "--quiet", "--depth", "1", "--branch", tag, "--", url)]
            done = _run([*command, str(tree)], sources_dir)
            if done.returncode != 0:
                words = (done.stderr.strip().splitlines() or ["no output"])[-1]
                raise BuildFailed(f"{url} at {tag} could not be cloned: {words}")
            if not (tree / MARKER).is_file():
                raise SourceRejected(f"{url} at {tag} has no {MARKER}: it is not llama.cpp")
            digest = _seal(tree, target)
    return Source(target, source, digest, _commit_of(target))


def _sealed(target: Path) -> str | None:
    """The hash of the tree `target` if nobody changed it since it was put there."""
    try:
        digest = target.with_suffix(".sha256").read_text()
    except OSError:
        return None
    if not (target / MARKER).is_file():
        return None
    return digest if digest == tree_sha256(target) else None


def _seal(tree: Path, target: Path) -> str:
    """Put `tree` in place of `target`, and its hash beside it; returns that. The hash is written
    last: a tree somebody edits later must not pass for what it was made from."""
    seal = target.with_suffix(".sha256")
    seal.unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    tree.rename(target)
    digest = tree_sha256(target)
    seal.write_text(digest)
    return digest


def _commit_of(tree: Path) -> str:
    if not (tree / ".git").exists():
        return "unknown"  # git would tell the commit of whatever repository lies around it
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
            env=environment_of_children({"GIT_TERMINAL_PROMPT": "0"}),
            check=False,
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    except subprocess.TimeoutExpired:
        words = f"{command[0]} took more than {FETCH_LIMIT_S:.0f} s"
        return subprocess.CompletedProcess(command, 124, "", words)
