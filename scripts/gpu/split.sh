#!/bin/sh
# Shows on a machine with two NVIDIA GPUs what a model costs that lies on both, each in a node of its
# own: builds the CUDA engine (or takes the one built last time), generates a model of 13 GB, serves
# it with one node that may use all of its GPU, and then with two of which neither may use enough for
# it; in turns with them, the same engines without meshd between them. Then it kills: the worker's RPC
# server, the worker's daemon. Prints a table last; exit code 0 only if everything was as it should
# be.
#
#   scripts/gpu/split.sh
#
# WORK: where engines, model and environment go (default: ./.prove, as for prove.sh); a second run
#   goes on from there.
# SOURCE, JOBS, WHEELS: as for prove.sh.
# RUNTIME_DIR: a directory with an engine to use instead of building one.
# SPLIT_BACKEND: `cuda` (the default), or `cpu`: the same steps with a model of 417 MB and no GPU.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
WORK=${WORK:-$root/.prove} exec sh "$root/scripts/gpu/with-venv.sh" split_steps.py
