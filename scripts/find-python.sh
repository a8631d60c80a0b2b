#!/usr/bin/env bash
# Prints the first Python that is new enough (3.11), really runs and can make environments (on Debian
# that needs python3-venv); nothing if there is none.
for candidate in python3 python3.13 python3.12 python3.11 python3.14; do
  if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "$candidate"
    exit 0
  fi
done
