#!/bin/sh
# Compiles the sources of llama.cpp's CUDA backend where there is a CUDA compiler and nothing else:
# no GPU, no driver, no cuBLAS to link with. Object files show that nvcc takes every source for an
# architecture that no machine at hand has.
#
#   scripts/gpu/compile-only.sh                     the pinned source for sm_121
#   ARCH=90 JOBS=8 scripts/gpu/compile-only.sh      another architecture; compilers at once
#   ONLY=rope scripts/gpu/compile-only.sh           only objects whose name has this in it
#   SOURCE=… scripts/gpu/compile-only.sh            as --source of `meshd runtime build`
#
# The flags are those of `meshd runtime build --backend cuda` on a machine without a driver. Needs
# .venv (`make venv`; PYTHON names another one), cmake and ninja; cuBLAS' headers come from
# the Python package index if the toolkit has none. Objects are kept in WORK (a directory of
# the cache), so that an interrupted run goes on. Prints how many were compiled; 0 if all were.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
arch=${ARCH:-121}
jobs=${JOBS:-$(nproc)}
python=${PYTHON:-$root/.venv/bin/python}
work=${WORK:-${XDG_CACHE_HOME:-$HOME/.cache}/meshd/compile-only-$arch}

for tool in nvcc cmake ninja "$python"; do
  if ! command -v "$tool" >/dev/null; then
    echo "this needs $tool: nvcc is CUDA's, cmake and ninja are packages of these names" \
      "(ninja-build on Debian), and 'make venv' makes .venv" >&2
    exit 1
  fi
done
release=$(nvcc --version | sed -n 's/.*release \([0-9]*\.[0-9]*\).*/\1/p')
mkdir -p "$work"

# The source's directory, then the flags of a real build, one a line.
ARCH=$arch SOURCE=${SOURCE:-} "$python" - >"$work/choices" <<'END'
import os
import sys

from meshd import config
from meshd.errors import MeshdError
from meshd.runtime.choices import BuildOptions, cmake_args
from meshd.runtime.nvcc import parse_architectures
from meshd.runtime.sources import obtain

sources = config.load().config.cache_dir / "meshd" / "sources"
try:
    arch = ";".join(parse_architectures(os.environ["ARCH"]))
    source = obtain(os.environ["SOURCE"] or None, sources)
except (MeshdError, ValueError) as error:
    sys.exit(str(error))
options = BuildOptions("cuda", cuda_arch=arch, link_driver=False)
print(source.directory, *cmake_args(options, source.commit), sep="\n")
END
source=$(head -n 1 "$work/choices")
set --
while IFS= read -r line; do
  set -- "$@" "$line"
done <<END
$(tail -n +2 "$work/choices")
END

if ! printf '#include <cublas_v2.h>\n' | nvcc -E -x cu - >/dev/null 2>&1; then
  case $release in
    12.*) package=nvidia-cublas-cu12 ;;
    *) package=nvidia-cublas ;;
  esac
  if [ ! -d "$work/cublas" ]; then
    echo "cuBLAS' headers are fetched: $package==$release.*" >&2
    rm -rf "$work/cublas.partial"
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
      --target "$work/cublas.partial" "$package==$release.*"
    mv "$work/cublas.partial" "$work/cublas"
  fi
  header=$(find "$work/cublas" -name cublas_v2.h | head -n 1)
  library=$(find "$work/cublas" -name 'libcublas.so*' | head -n 1)
  # CMake wants to know a library to link with; nothing is linked here.
  set -- "$@" "-DCMAKE_CUDA_FLAGS=-I$(dirname -- "$header")" "-DCUDA_cublas_LIBRARY=$library"
fi

build=$work/build
GIT_CEILING_DIRECTORIES=$(dirname -- "$source") cmake -G Ninja -S "$source" -B "$build" "$@" \
  >"$work/configure.log" 2>&1 || {
  tail -n 20 "$work/configure.log" >&2
  exit 1
}
ninja -C "$build" -t targets all |
  sed -n 's/^\(.*ggml-cuda\.dir\/.*\.o\): .*/\1/p' | grep -e "${ONLY:-.}" | sort >"$work/objects"
wanted=$(wc -l <"$work/objects")
if [ "$wanted" -eq 0 ]; then
  echo "no CUDA object has ${ONLY:-a name} in it" >&2
  exit 1
fi
started=$(date +%s)
status=0
xargs -r ninja -C "$build" -j "$jobs" -k 0 <"$work/objects" || status=1
made=0
while IFS= read -r object; do
  if [ -s "$build/$object" ]; then made=$((made + 1)); fi
done <"$work/objects"
echo "compiled $made of $wanted CUDA objects for sm_$arch with nvcc $release" \
  "in $(($(date +%s) - started)) s"
exit "$status"
