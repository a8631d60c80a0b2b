#!/bin/sh
# Builds an engine and leaves nothing but it: `engine.sh DIRECTORY WORD…` runs `meshd runtime build
# WORD…` (see scripts/build-linux.sh) and moves what was published, record included, to
# DIRECTORY/<id>.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
target=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
XDG_CACHE_HOME=$work VENV=$work/venv "$root/scripts/build-linux.sh" "$@"
mkdir -p "$target"
for record in "$work"/meshd/runtimes/*/record.json; do
  mv "${record%/record.json}" "$target/"
done
chmod -R a+rX "$target"
