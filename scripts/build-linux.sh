#!/bin/sh
# Builds an engine on a machine that has nothing of meshd yet: finds a Python, makes an environment,
# installs meshd from this checkout into it and runs `meshd runtime build` with the words given:
#
#   scripts/build-linux.sh --backend cpu
#   scripts/build-linux.sh --backend cuda --cuda-arch 121
#
# The engine goes to <cache>/meshd/runtimes, where <cache> is $XDG_CACHE_HOME or ~/.cache; the
# environment to $VENV or <cache>/meshd/venv. What the build lacks of the system (a compiler,
# CUDA's toolkit) is named with the package that has it. Interrupted, the same command goes on.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
cache=${XDG_CACHE_HOME:-${HOME:?neither XDG_CACHE_HOME nor HOME says where the engine may go}/.cache}
venv=${VENV:-$cache/meshd/venv}

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
  python=$(sh "$root/scripts/find-python.sh")
  if [ -z "$python" ]; then
    echo "meshd needs Python 3.11 or newer with venv: 'apt install python3 python3-venv' (Debian," \
      "Ubuntu), 'dnf install python3' (Fedora) or 'pacman -S python' (Arch)" >&2
    exit 1
  fi
  mkdir -p "$(dirname -- "$venv")"
  "$python" -m venv --clear "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "$root"
exec "$venv/bin/meshd" runtime build "$@"
