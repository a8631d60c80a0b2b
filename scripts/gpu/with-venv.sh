#!/bin/sh
# Runs a script of this directory with a Python that has what meshd needs, made in WORK/venv when it
# is not there yet. PYTHONPATH is the checkout, so that its meshd is the one that is looked at.
#
#   WORK=DIR scripts/gpu/with-venv.sh SCRIPT.py
#
# WHEELS: a directory with wheels of meshd's dependencies, for a machine without network.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
mkdir -p "$WORK"
venv=$WORK/venv
if ! "$venv/bin/python" -c 'import aiohttp' 2>/dev/null; then
  "$(sh "$root/scripts/find-python.sh")" -m venv --clear "$venv"
  if [ -n "${WHEELS:-}" ]; then
    "$venv/bin/python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
  else
    "$venv/bin/python" -m pip install --quiet --require-hashes -r "$root/requirements.lock"
  fi
fi
PYTHONPATH=$root WORK=$WORK exec "$venv/bin/python" "$root/scripts/gpu/$1"
