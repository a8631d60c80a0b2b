#!/bin/sh
# Makes the user `meshd`, of a number that does not change between images, and its directories: the
# owner of volumes stays the same. `user.sh NUMBER`.
set -eu

number=$1
groupadd --gid "$number" meshd
useradd --uid "$number" --gid meshd --home-dir /var/lib/meshd --no-create-home \
  --shell /usr/sbin/nologin meshd
install -d -m 0700 -o meshd -g meshd /var/lib/meshd /var/cache/meshd
