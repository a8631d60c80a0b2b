"""`python -m tests.hub OWNER/NAME DIRECTORY`: serve all files of it until standard input ends.

Prints the endpoint, for HF_ENDPOINT, on a line.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.hub.hub import LocalHub


def main(repo: str, directory: Path) -> None:
    files: dict[str, bytes | Path] = {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    with LocalHub() as hub:
        hub.add(repo, files)
        sys.stdout.write(f"{hub.endpoint}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
