#!/usr/bin/env bash
# Runs meshd on aarch64 without such a machine: the stages of Dockerfile.cuda-arm64, by the scripts
# they are made of, in an emulated Debian 12, as far as they need no NVIDIA image; then a node as the
# image starts it, which answers a chat with an engine compiled for aarch64. Prints a table last.
#
# Wants root and, of Debian, qemu-user-static, debootstrap, g++-aarch64-linux-gnu, cmake and
# ninja-build; meshd in .venv. Some 30 minutes the first time, a few later: the emulated Debian, the
# packages for it and the engine are kept in <cache>/meshd/tests/arm64.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"

root=$(cd "$(dirname "$0")/../.." && pwd)
kept=${XDG_CACHE_HOME:-$HOME/.cache}/meshd/tests/arm64
python=$root/.venv/bin/python
mirror=${MIRROR:-http://deb.debian.org/debian}
formats=/proc/sys/fs/binfmt_misc
mkdir -p "$kept"

for tool in qemu-aarch64-static debootstrap aarch64-linux-gnu-g++ cmake ninja unshare; do
  command -v "$tool" >/dev/null || { echo "check.sh: $tool is not installed" >&2; exit 1; }
done
[ "$(id -u)" -eq 0 ] || { echo "check.sh: an emulated Debian needs root" >&2; exit 1; }

# 1. The kernel hands programs of aarch64 to the emulator, as Debian's package asks it to at boot.
[ -e $formats/register ] || mount -t binfmt_misc none $formats
[ -e $formats/qemu-aarch64 ] || cat /usr/lib/binfmt.d/qemu-aarch64.conf >$formats/register

# 2. A pristine Debian. What the stages install is there already; packages.sh still says so itself.
if [ ! -d "$kept/tree" ]; then
  rm -rf "$kept/unfinished-tree"
  debootstrap --arch=arm64 --variant=minbase \
    --include=ca-certificates,curl,g++,libgomp1,procps,python3,python3-venv,tini \
    bookworm "$kept/unfinished-tree" "$mirror" >&2
  mv "$kept/unfinished-tree" "$kept/tree"
fi

# 3. The Python packages of the lock, for aarch64 and by their hashes, and what makes wheels.
lock=$(sha256sum "$root/requirements.lock" | cut -c1-12)
if [ ! -d "$kept/wheels-$lock" ]; then
  platforms=(--platform manylinux2014_aarch64)
  for glibc in {17..36}; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
  fetch=("$python" -m pip download --quiet --only-binary :all: "${platforms[@]}"
    --python-version 3.11 --dest "$kept/unfinished-wheels")
  rm -rf "$kept/unfinished-wheels"
  "${fetch[@]}" --require-hashes --requirement "$root/requirements.lock"
  "${fetch[@]}" hatchling cmake ninja
  mv "$kept/unfinished-wheels" "$kept/wheels-$lock"
fi

# 4. The engine: compiling it in the emulator would take hours.
engine=$("$root/scripts/arm64/cross-compile.sh")

# 5. This checkout, as Docker would see it, and the stages, in a copy of the tree with processes and
# a network of its own. The check of package lists alone is given the network.
run=$(mktemp -d "$kept/run-XXXXXX")
trap 'rm -rf "$run"' EXIT
tree=$run/tree
cp -a --reflink=auto "$kept/tree" "$tree"
mkdir -p "$tree/src/packaging" "$tree/engine" "$tree/wheels"
cp -a "$root"/{LICENSE,README.md,pyproject.toml,requirements.lock,meshd,scripts} "$tree/src/"
cp -a "$root/packaging/image" "$tree/src/packaging/"
cp -a "$engine"/. "$tree/engine/"
cp -a "$kept/wheels-$lock"/. "$tree/wheels/"
(cd "$root" && "$python" -c '
import sys
from pathlib import Path
from tests.runtime.toy_source import toy_tree

toy_tree(Path(sys.argv[1]))
' "$tree/toy")
cp /etc/resolv.conf "$tree/etc/resolv.conf"
version=$(cd "$root" && "$python" -c 'import meshd; print(meshd.__version__)')

for stage in engine meshd final; do
  chroot "$tree" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin /src/packaging/image/packages.sh "$stage"
done
# shellcheck disable=SC2016 # the words are for the shell inside
unshare --mount --pid --net --ipc --uts --fork --kill-child sh -eu -c '
  ip link set lo up
  mount -t proc proc "$1/proc"
  exec chroot "$1" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
    /src/scripts/arm64/stages.sh "$2"
' check "$tree" "$version"
