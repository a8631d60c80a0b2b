#!/usr/bin/env bash
# What building the engine and running the tests needs from the system.
# As root on Debian or Ubuntu: installs what is missing. Otherwise: names it, and fails only for
# what nothing works without (a C++ compiler). `service`: also what `make service-test` needs.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin" # where ip and nft are, which the tests of meshes make networks with

declare -A package_of=([g++]=g++ [make]=make [git]=git [ip]=iproute2 [nft]=nftables)
[ "${1:-}" = service ] && package_of+=([systemd-nspawn]=systemd-container [debootstrap]=debootstrap)
required=(g++ make)

missing=()
for command in "${!package_of[@]}"; do
  command -v "$command" >/dev/null || missing+=("${package_of[$command]}")
done
[ -n "$("$(dirname "$0")/find-python.sh")" ] || missing+=(python3 python3-venv)
[ "${#missing[@]}" -eq 0 ] && exit 0

if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  echo "installing: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  exit 0
fi

echo "missing: ${missing[*]}; on Debian and Ubuntu: apt install ${missing[*]}" >&2
for command in "${required[@]}"; do
  command -v "$command" >/dev/null || exit 1
done
