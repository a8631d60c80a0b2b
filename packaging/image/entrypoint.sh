#!/bin/sh
# Shows the image's engines to meshd, then is meshd: `entrypoint.sh WORD…`.
#
# Engines are looked for in the cache, which is a volume and outlives the image: links lead from there
# into the image, and those to engines of an older image are removed.
set -eu

engines=${ENGINES:-/opt/meshd/runtimes}
shown=$XDG_CACHE_HOME/meshd/runtimes
mkdir -p "$shown"
for link in "$shown"/*; do
  if [ -L "$link" ] && [ ! -e "$link" ]; then
    rm -f "$link"
  fi
done
for engine in "$engines"/*; do
  [ -d "$engine" ] || continue
  name=${engine##*/}
  # One of that id which was built in the volume itself is the same engine.
  if [ ! -e "$shown/$name" ]; then
    ln -sfn "$engine" "$shown/$name"
  fi
done
exec meshd "$@"
