#!/usr/bin/env bash
# The demonstration (`make demo`): two releases go out to six stand-in agents on this machine.
#
# Needs Linux, Python 3.9 or newer (PYTHON names it, else python3) and openssl; takes about 15 seconds.
# All of it happens in a temporary folder and on loopback addresses chosen at random, and is gone
# at the end. Exit codes: 0 both releases ended as they should, 1 one did not or the
# demonstration could not run, 3 a program is missing.
set -euo pipefail

# shellcheck source=scripts/lab.sh
source "$(dirname "${BASH_SOURCE[0]}")/lab.sh"

DEADLINE_S=30 # for a start, and for each release

announce() { printf '\n== %s\n' "$1"; }

serving() {
    kill -0 "$PID" 2>/dev/null || give_up "serve ended at its start"
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
    timeout "$DEADLINE_S" "${program[@]}" "$@" 2>&1 || CODE=$?
}

# Says whether a release ended so: its status, then how many nodes succeeded, failed and were skipped.
ended_as() { # RELEASE EXPECTED
    local got
    got=$(releasectl status "$1" --json | "$python" -c 'import json, sys
release = json.load(sys.stdin)["release"]
print(*(release[key] for key in ("status", "successNodes", "failedNodes", "skippedNodes")))') || got="no answer"
    [[ $got == "$2" ]] || give_up "release $1 should have ended as \"$2\", it is \"$got\""
}

# --- The demonstration ----------------------------------------------------------------------

need openssl
need_python
begin_work
compile_program
forget_settings
cd "$work"
export PYTHONDONTWRITEBYTECODE=1 RELEASE_EXECUTOR_INTERVAL_SEC=1
export CONTROL_CERT=certs/control.crt CONTROL_KEY=certs/control.key CONTROL_CA=certs/ca.crt

announce "1. Certificates: a CA, one for releasectl and one for each of six agents; then the agents start."
start_agents 4 2
# each takes a little longer than the one before, so that one sees them come in
for n in 1 2 3 4 5 6; do set_agent "$n" "{\"taskMs\": $((n * 500 + 1000))}"; done
HTTP_ADDR=127.0.0.1:$(free_port)
export HTTP_ADDR
echo "The agents listen on $subnet.1 to $subnet.6 and demand a client certificate."

announce "2. The six nodes go into a new database, an SQLite file. The agents are asked whether they answer."
for n in 1 2 3 4; do echo "edge-$n $subnet.$n"; done >nodes.txt
for n in 5 6; do echo "edge-$n $subnet.$n 9090 execute"; done >>nodes.txt
releasectl migrate >migrate.log 2>&1 || give_up "migrate failed"
show node import nodes.txt
show node ping
[[ $CODE == 0 ]] || give_up "not every agent answered"

announce "3. The process \"releasectl.py serve\" starts: the API, and the executor that sends releases out."
in_background "${program[@]}" serve >serve.log 2>&1
wait_for "serve to be ready" serving
echo "It listens on http://$HTTP_ADDR and scans for work every second."

announce "4. The first release: edge-1 alone is batch 1; when it has succeeded, the other five are batch 2."
echo '{"websites": [{"name": "www.example.com"}]}' >site.json
echo "The payload, site.json: $(cat site.json)"
show create --payload site.json --reason "a good version" --wait
[[ $CODE == 0 ]] || give_up "create --wait ended with exit code $CODE instead of 0"
show status 1
ended_as 1 "success 6 0 0"

announce "5. Now edge-1 is told to fail its next task. The same again: what happens to the other five?"
set_agent 1 '{"outcome":"failed","message":"nginx: configuration test failed"}'
show create --payload site.json --reason "a bad version" --wait
[[ $CODE == 1 ]] || give_up "create --wait ended with exit code $CODE instead of 1"
show status 2
echo "The release stopped at batch 1. No request went to the five nodes of batch 2. Its history:"
show events 2
ended_as 2 "failed 0 1 5"

announce "Both releases ended as they should: one went out to all nodes, one was stopped by its first node."
echo "Go on with README.md, \"First steps\", for a real installation, and docs/OPERATIONS.md for the rest."
