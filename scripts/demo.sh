#!/usr/bin/env bash
# The demonstration (`make demo`): two releases go out to six stand-in agents on this machine.
#
# Needs Linux, Python 3.9 or newer (PYTHON names it, else python3) and openssl; takes about 15 seconds.
# All of it happens in a temporary folder and on loopback addresses chosen at random, and is gone
# at the end. Exit codes: 0 both releases ended as they should, 1 one did not or the
# demonstration could not run, 3 a program is missing.
set -euo pipefail

readonly DEADLINE_S=30 # for a start, and for each release
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n== %s\n' "$1"; }

fail() {
    local log
    printf 'demo: %s\n' "$1" >&2
    for log in "$work"/*.log; do
        [[ ! -s $log ]] || { echo "--- the end of ${log##*/}:"; tail -n 10 "$log"; } >&2
    done
    exit 1
}

# --- Set-up and clean-up --------------------------------------------------------------------

pids=()
work=$(mktemp -d)

clean_up() {
    local pid
    for pid in "${pids[@]+"${pids[@]}"}"; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in "${pids[@]+"${pids[@]}"}"; do
        for _ in {1..100}; do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
        kill -KILL "$pid" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

in_background() { # LOG COMMAND...; sets PID
    local log=$1
    shift
    "$@" >"$log" 2>&1 </dev/null &
    PID=$!
    pids+=("$PID")
}

wait_for() { # WHAT COMMAND...
    local what=$1 deadline=$((SECONDS + DEADLINE_S))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || fail "waited $DEADLINE_S s in vain for $what"
        sleep 0.1
    done
}

need_programs() {
    command -v openssl >/dev/null || { echo "demo: openssl is missing: install it" >&2; exit 3; }
    python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable if sys.version_info >= (3, 9) else "")') || python=""
    [[ -n $python ]] || { echo "demo: ${PYTHON:-python3} is not Python 3.9 or newer: name one with PYTHON=..." >&2; exit 3; }
}

# Settings that this shell may carry must not send the demonstration to a real database.
forget_settings() {
    local name
    while read -r name; do unset "$name"; done < <(
        "$python" -c 'import sys; sys.dont_write_bytecode = True; sys.path.insert(0, sys.argv[1])
import releasectl; print(*(s.name for s in releasectl.SETTINGS), sep="\n")' "$root")
}

# Below the range that the kernel gives to clients.
free_port() {
    local port
    while :; do
        port=$((RANDOM % 16000 + 16000))
        (: </dev/tcp/127.0.0.1/$port) 2>/dev/null || { echo "$port"; return; }
    done
}

agents_settled() { grep -q '^ready:' agents.log || ! kill -0 "$PID" 2>/dev/null; }

# edge-1 to edge-4 speak the dialect `tasks`, edge-5 and edge-6 `execute`; each takes a little
# longer than the one before, so that one sees them come in. Another demonstration may have the
# same addresses, hence the tries.
start_agents() {
    local try n addresses slower
    for try in 1 2 3; do
        subnet=127.$((RANDOM % 253 + 1)).$((RANDOM % 254 + 1)) control_port=$(free_port) addresses=() slower=()
        for n in 1 2 3 4 5 6; do
            addresses+=("$subnet.$n")
            slower+=(--set "$subnet.$n" "taskMs=$((n * 500 + 1000))")
        done
        bash "$root/scripts/make_certs.sh" certs "${addresses[@]}" >certs.log 2>&1 || fail "scripts/make_certs.sh failed"
        in_background agents.log "$python" "$root/scripts/fake_agent.py" --certs certs "${slower[@]}" \
            --listen "$subnet.1-$subnet.4:8443" --listen "$subnet.5-$subnet.6:9090,execute" \
            --control "127.0.0.1:$control_port"
        wait_for "the agents" agents_settled
        if grep -q '^ready:' agents.log; then return; fi
    done
    fail "the agents did not start in $try tries"
}

set_agent() { # NUMBER JSON
    "$python" -c 'import http.client, sys
agents = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=10)
agents.request("PUT", "/agents/" + sys.argv[2], sys.argv[3])
sys.exit(agents.getresponse().status != 200)' "$control_port" "$subnet.$1" "$2" || fail "could not change the agent of edge-$1"
}

serving() {
    kill -0 "$PID" 2>/dev/null || fail "serve ended at its start"
    grep -q 'serving http' serve.log
}

# --- What is shown --------------------------------------------------------------------------

# Shows a command as an operator would type it, and runs it; sets CODE.
show() { # ARGUMENT...
    local word
    printf '$ python releasectl.py'
    for word in "$@"; do
        case $word in *' '*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac
    done
    echo
    CODE=0
    timeout "$DEADLINE_S" "$python" "$root/releasectl.py" "$@" 2>&1 || CODE=$?
}

# Says whether a release ended so: its status, then how many nodes succeeded, failed and were skipped.
ended_as() { # RELEASE EXPECTED
    local got
    got=$("$python" "$root/releasectl.py" status "$1" --json | "$python" -c 'import json, sys
release = json.load(sys.stdin)["release"]
print(*(release[key] for key in ("status", "successNodes", "failedNodes", "skippedNodes")))') || got="no answer"
    [[ $got == "$2" ]] || fail "release $1 should have ended as \"$2\", it is \"$got\""
}

# --- The demonstration ----------------------------------------------------------------------

need_programs
forget_settings
cd "$work"
export PYTHONDONTWRITEBYTECODE=1 RELEASE_EXECUTOR_INTERVAL_SEC=1
export CONTROL_CERT=certs/control.crt CONTROL_KEY=certs/control.key CONTROL_CA=certs/ca.crt

say "1. Certificates: a CA, one for releasectl and one for each of six agents; then the agents start."
start_agents
HTTP_ADDR=127.0.0.1:$(free_port)
export HTTP_ADDR
echo "The agents listen on $subnet.1 to $subnet.6 and demand a client certificate."

say "2. The six nodes go into a new database, an SQLite file. The agents are asked whether they answer."
for n in 1 2 3 4; do echo "edge-$n $subnet.$n"; done >nodes.txt
for n in 5 6; do echo "edge-$n $subnet.$n 9090 execute"; done >>nodes.txt
"$python" "$root/releasectl.py" migrate >migrate.log 2>&1 || fail "migrate failed"
show node import nodes.txt
show node ping
[[ $CODE == 0 ]] || fail "not every agent answered"

say "3. The process \"releasectl.py serve\" starts: the API, and the executor that sends releases out."
in_background serve.log "$python" "$root/releasectl.py" serve
wait_for "serve to be ready" serving
echo "It listens on http://$HTTP_ADDR and looks for work every second."

say "4. The first release: edge-1 alone is batch 1; when it has succeeded, the other five are batch 2."
echo '{"websites": [{"name": "www.example.com"}]}' >site.json
echo "The payload, site.json: $(cat site.json)"
show create --payload site.json --reason "a good version" --wait
[[ $CODE == 0 ]] || fail "create --wait ended with exit code $CODE instead of 0"
show status 1
ended_as 1 "success 6 0 0"

say "5. Now edge-1 is told to fail its next task. The same again: what happens to the other five?"
set_agent 1 '{"outcome":"failed","message":"nginx: configuration test failed"}'
show create --payload site.json --reason "a bad version" --wait
[[ $CODE == 1 ]] || fail "create --wait ended with exit code $CODE instead of 1"
show status 2
echo "The release stopped at batch 1. No request went to the five nodes of batch 2. Its history:"
show events 2
ended_as 2 "failed 0 1 5"

say "Both releases ended as they should: one went out to all nodes, one was stopped by its first node."
echo "Go on with README.md, \"First steps\", for a real installation, and docs/OPERATIONS.md for the rest."
