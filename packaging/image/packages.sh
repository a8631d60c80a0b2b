#!/bin/sh
# Installs what a stage of the image needs of Debian or Ubuntu: `packages.sh engine|meshd|final
# [PACKAGE…]`. Lists of packages are not kept.
set -eu

stage=$1
shift
case "$stage" in
engine) set -- g++ python3 python3-venv "$@" ;; # cmake and ninja come as Python packages
meshd) set -- python3 python3-venv "$@" ;;
final) set -- ca-certificates libgomp1 python3 tini "$@" ;;
*)
  echo "packages.sh: no stage is called $stage" >&2
  exit 2
  ;;
esac
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "$@"
rm -rf /var/lib/apt/lists/*
