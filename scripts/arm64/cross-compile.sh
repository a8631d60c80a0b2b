#!/bin/sh
# Compiles the pinned llama.cpp for aarch64 on another machine, with the choices `meshd runtime
# build` makes except GGML_NATIVE, and prints where the binaries lie. Takes minutes; interrupted, it
# goes on.
#
# Wants aarch64-linux-gnu-g++ (Debian: apt install g++-aarch64-linux-gnu), cmake and ninja, and meshd
# in $PYTHON or .venv. JOBS compilers at once (default 1).
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
target=aarch64-linux-gnu
work=${XDG_CACHE_HOME:-$HOME/.cache}/meshd/tests/arm64/engine

# One argument a line: none of them has a newline in it.
source=$("$python" - <<'END'
from meshd.config import load
from meshd.runtime.sources import obtain

print(obtain(None, load().config.cache_dir / "meshd" / "sources").directory)
END
)
set -- -G Ninja -S "$source" -B "$work"
while read -r choice; do
  set -- "$@" "$choice"
done <<END
$("$python" - <<'INNER'
from meshd.runtime.choices import BuildOptions, cmake_args
from meshd.runtime.sources import PINNED

print("\n".join(cmake_args(BuildOptions(), PINNED.commit)))
INNER
)
END
mkdir -p "$work"
cmake "$@" -DGGML_NATIVE=OFF -DLLAMA_OPENSSL=OFF \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_C_COMPILER=$target-gcc -DCMAKE_CXX_COMPILER=$target-g++ >&2
nice -n 19 ninja -C "$work" -j "${JOBS:-1}" llama-server ggml-rpc-server >&2
echo "$work/bin"
