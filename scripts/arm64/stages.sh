#!/bin/bash
# The part of check.sh that runs on aarch64: `stages.sh VERSION`. In /src is the checkout, in /wheels
# are Python packages, in /engine is llama.cpp for this processor, in /toy a small source that builds
# like it.
set -euo pipefail

version=$1
image=/src/packaging/image
rows=()
say() { # STEP WORDS: a row of the table, and at once for those who watch
  rows+=("$(printf '%-34s %5s s  %s' "$1" "$SECONDS" "$2")")
  echo "${rows[-1]}" >&2
  SECONDS=0
}
fail() { echo "stages.sh: $*" >&2; exit 1; }
export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels PIP_ROOT_USER_ACTION=ignore
SECONDS=0

# 1. Stage `engine`, of a source that compiles in seconds.
$image/engine.sh /opt/meshd/runtimes --backend cpu --source /toy --jobs 2
built=$(ls /opt/meshd/runtimes)
[ -e "/opt/meshd/runtimes/$built/record.json" ] || fail "engine.sh left no engine"
say 'stage engine (toy source)' "$built"

# 2. Stage `meshd`; a version that is not this checkout's is refused.
if $image/meshd.sh /tmp/venv 0.0.0 2>/dev/null; then fail "meshd.sh took another version"; fi
rm -rf /tmp/venv
say 'another version' refused
$image/meshd.sh /opt/meshd/venv "$version"
say 'stage meshd' "$(/opt/meshd/venv/bin/meshd version | head -n 1)"

# 3. The last stage, and the image's environment; the engine is the one for this processor, and there
# is no GPU.
$image/user.sh 9337
cp $image/entrypoint.sh /opt/meshd/
export PATH=/opt/meshd/venv/bin:$PATH PYTHONUNBUFFERED=1
export HOME=/var/lib/meshd MESHD_DATA_DIR=/var/lib/meshd
export XDG_CACHE_HOME=/var/cache/meshd HF_HOME=/var/cache/meshd/huggingface
export MESHD_REQUIRE_GPU=false MESHD_RUNTIME_DIR=/engine MESHD_MDNS=false
cd /var/lib/meshd
as_meshd=(setpriv --reuid 9337 --regid 9337 --clear-groups --)
say 'last stage' "user $(id -u meshd)"

# 4. A node as the image starts it.
"${as_meshd[@]}" tini -- /opt/meshd/entrypoint.sh run --model builtin >/tmp/node.log 2>&1 &
node=$!
until_true() { # SECONDS COMMAND…
  local limit=$1 began=$SECONDS
  shift
  while ! "$@" >/dev/null 2>&1; do
    [ -d "/proc/$node" ] || fail "the node ended: $(tail -n 20 /tmp/node.log)"
    [ $((SECONDS - began)) -lt "$limit" ] || fail "after $limit s not yet: $*; $(tail -n 20 /tmp/node.log)"
    sleep 0.5
  done
}
until_true 180 curl --silent --fail http://127.0.0.1:9337/livez
say 'meshd run listens' "$(uname -m)"
[ -e "/var/cache/meshd/meshd/runtimes/$built/record.json" ] || fail "the engine is not shown"
until_true 60 "${as_meshd[@]}" meshd status --json
say 'health check' 'meshd status: 0'
until_true 300 curl --silent --fail http://127.0.0.1:9337/readyz
body='{"model":"builtin","max_tokens":16,"messages":[{"role":"user","content":"Hello"}]}'
answer=$(curl --silent --fail --max-time 300 -H 'content-type: application/json' \
  -H 'x-meshd-wait-s: 240' -d "$body" http://127.0.0.1:9337/v1/chat/completions) ||
  fail "no chat: $(tail -n 20 /tmp/node.log)"
tokens=$(python3 -c '
import json, sys
answer = json.loads(sys.argv[1])
assert answer["choices"][0]["message"]["content"], answer
print(answer["usage"]["completion_tokens"])
' "$answer")
say 'chat with builtin' "$tokens tokens"

# 5. doctor sees this machine. It may complain of the emulation, under which the kernel runs qemu and
# not the engine's file (`installed`), and of nothing else.
"${as_meshd[@]}" meshd doctor --json >/tmp/doctor.json || true
checks=$(python3 -c '
import json
from collections import Counter
steps = json.load(open("/tmp/doctor.json"))
counts = Counter(step["state"] for step in steps)
failed = [step["step"] for step in steps if step["state"] == "failed"]
assert set(failed) <= {"installed"}, failed
print(dict(counts), "failed:", ", ".join(failed) or "none")
') || fail "doctor: $(cat /tmp/doctor.json)"
say 'meshd doctor' "$checks"

# 6. A stop ends it cleanly.
kill -TERM "$node"
wait "$node" || fail "the stop: exit code $?; $(tail -n 20 /tmp/node.log)"
say 'stop' 'exit code 0'
printf '%s\n' "${rows[@]}"
