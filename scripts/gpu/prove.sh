#!/bin/sh
# Proves on a machine with an NVIDIA GPU what meshd says of it, and that it cannot be lied to: builds
# the CUDA engine for the GPU that is there, compares meshd's word with nvidia-smi's, serves a model
# of some GB with every layer on the GPU, and then takes things away: the device, the right engine,
# the fresh binary. Prints a table last; exit code 0 only if everything was as it should be.
#
#   scripts/gpu/prove.sh
#
# WORK: where engines, model and environment go (default: ./.prove); a second run goes on from there.
# SOURCE: llama.cpp as `meshd runtime build --source` takes it (default: the pinned one, fetched).
# JOBS: compilers at once (default: as many as processors and memory allow).
# WHEELS: a directory with wheels of meshd's dependencies, for a machine without network.
# STEPS: `build`, `rest` or `all` (the default).
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
WORK=${WORK:-$root/.prove} exec sh "$root/scripts/gpu/with-venv.sh" prove.py
