#!/bin/sh
# Makes a wheel of this checkout and an environment with it: `meshd.sh ENVIRONMENT [VERSION]`.
#
# Dependencies are the files requirements.lock names, checked by their hashes; those only the tests
# need are fetched with them and not installed. VERSION, if given, must be the wheel's.
# PIP_NO_INDEX and PIP_FIND_LINKS let it work without a network.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
environment=$1
version=${2:-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python=$(sh "$root/scripts/find-python.sh")
[ -n "$python" ] || { echo "meshd needs Python 3.11 or newer with venv" >&2; exit 1; }
"$python" -m venv "$environment"
pip="$environment/bin/python -m pip --disable-pip-version-check"
$pip wheel --quiet --no-deps --wheel-dir "$work/wheel" "$root"
if [ -n "$version" ] && [ ! -e "$work/wheel/meshd-$version-py3-none-any.whl" ]; then
  echo "meshd.sh: asked for meshd $version, this checkout makes $(ls "$work/wheel")" >&2
  exit 1
fi
$pip download --quiet --require-hashes --only-binary :all: --dest "$work/files" \
  --requirement "$root/requirements.lock"
$pip install --quiet --no-index --find-links "$work/files" "$work"/wheel/meshd-*.whl
$pip uninstall --quiet --yes pip
"$environment/bin/meshd" version
