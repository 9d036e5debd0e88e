#!/usr/bin/env bash
# The acceptance test: releases that really run, watched from outside, by SQL and by curl.
#
#   scripts/test_release_executor.sh                                     on a new SQLite file
#   DATABASE_URL=postgresql://... scripts/test_release_executor.sh       on a fresh database
#
# Real are: releasectl.py (run-once, serve), mutual TLS, the database and its shell. Stand-ins are
# the agents (scripts/fake_agent.py) on loopback addresses chosen at random, so that two runs can
# go side by side. PYTHON names the Python (python3). Prints a line for each check and a count;
# exit codes: 0 all passed, 1 a check failed, 2 the test could not run, 3 a program is missing.
set -euo pipefail

# shellcheck source=scripts/lab.sh
source "$(dirname "${BASH_SOURCE[0]}")/lab.sh"

GIVE_UP_CODE=2
DEADLINE_S=60 # for whatever is waited for
readonly TASK_MS=700 # so long that every state in between is seen

# --- Checks ---------------------------------------------------------------------------------

passed=0 failed=0

report() { # ok|not-ok DESCRIPTION [DETAIL]
    if [[ $1 == ok ]]; then
        passed=$((passed + 1))
        echo "ok $((passed + failed)) - $2"
    else
        failed=$((failed + 1))
        echo "not ok $((passed + failed)) - $2"
        printf '%s\n' "${3:-}" | sed 's/^/#   /'
    fi
}

equals() { # DESCRIPTION EXPECTED ACTUAL
    if [[ $2 == "$3" ]]; then report ok "$1"; else report not-ok "$1" "expected: $2"$'\n'"     got: $3"; fi
}

matches() { # DESCRIPTION PATTERN ACTUAL (an extended regular expression for the whole text)
    if [[ $3 =~ ^($2)$ ]]; then report ok "$1"; else report not-ok "$1" "expected: $2"$'\n'"     got: $3"; fi
}

# --- Set-up and clean-up --------------------------------------------------------------------

undo() {
    [[ -z ${second_database:-} ]] || sql "DROP DATABASE IF EXISTS $second_database" >/dev/null 2>&1 || true
}

is_postgres() { [[ $DATABASE_URL == postgres* ]]; }

# Runs one statement in the database's own shell; columns come out separated by "|".
sql() {
    if is_postgres; then
        "$psql" -X -q -A -t -v ON_ERROR_STOP=1 -d "$DATABASE_URL" -c "$1"
    else
        sqlite3 -batch -noheader -cmd '.timeout 10000' "${DATABASE_URL#sqlite:///}" "$1"
    fi
}

lines() { paste -sd ' ' -; } # several rows as one text

# --- Agents: .1 to .3 for the part by SQL, .4 to .6 for the part by curl, .7 (execute) for a second database ---

# Which agents ran a release's task, each as LAST-PART-OF-ADDRESS:TIMES.
runs_of() { # RELEASE
    curl -sS --noproxy '*' -m 10 -f "http://$control/agents" | "$python" -IS -c '
import json, sys
for address, agent in sorted(json.load(sys.stdin).items()):
    times = agent["runCounts"].get("apply_config_%s_%s" % (address, sys.argv[1]))
    if times:
        print("%s:%s" % (address.rpartition(".")[2], times))' \
        "$(sql "SELECT version || '_' || tag FROM release_tasks WHERE id = $1")" | lines
}

# All that an agent ever ran, of any database.
all_runs_of() { # LAST-PART-OF-ADDRESS
    curl -sS --noproxy '*' -m 10 -f "http://$control/agents" | "$python" -IS -c '
import json, sys
print(sum(json.load(sys.stdin)[sys.argv[1]]["runCounts"].values()))' "$subnet.$1"
}

# --- What is looked at by SQL ---------------------------------------------------------------

release_row() { sql "SELECT status, total_nodes, success_nodes, failed_nodes FROM release_tasks WHERE id = $1"; }

node_statuses() { sql "SELECT batch, status, COUNT(*) FROM release_task_nodes WHERE release_task_id = $1 GROUP BY batch, status ORDER BY batch, status" | lines; }

counted() { sql "SELECT COUNT(*) FROM release_task_nodes WHERE release_task_id = $1 AND status = '$2'"; }

# The changes of status in the history: of the release, or of its nodes in one batch.
release_changes() { sql "SELECT from_status, to_status FROM release_events WHERE release_task_id = $1 AND node_id IS NULL AND from_status <> '' AND to_status <> '' AND from_status <> to_status ORDER BY id" | lines; }

node_changes() { # RELEASE BATCH
    sql "SELECT e.from_status, e.to_status, COUNT(*) FROM release_events e JOIN release_task_nodes n ON n.release_task_id = e.release_task_id AND n.node_id = e.node_id WHERE e.release_task_id = $1 AND n.batch = $2 AND e.from_status <> '' AND e.to_status <> '' AND e.from_status <> e.to_status GROUP BY e.from_status, e.to_status ORDER BY MIN(e.id)" | lines
}

# Every change of a status in this database, as tests/contract.py allows it.
check_histories() {
    local found
    found=$(sql "SELECT release_task_id, node_id, from_status, to_status FROM release_events ORDER BY id" |
        "$python" "$lab_root/tests/contract.py") || true
    matches "no history has a change that the contract does not know" "[1-9][0-9]* events" "$found"
}

# All that a terminal release may never change.
frozen_rows() {
    sql "SELECT id, status, success_nodes, failed_nodes, error_msg, finished_at, updated_at FROM release_tasks WHERE id IN ($1) ORDER BY id"
    sql "SELECT id, status, task_id, attempts, error_msg, finished_at, updated_at FROM release_task_nodes WHERE release_task_id IN ($1) ORDER BY id"
}

# Writes each new picture of the nodes into a file, until the process ends.
watch_nodes() { # RELEASE PID FILE
    local last="" now is_last=0 deadline=$((SECONDS + DEADLINE_S))
    while :; do
        kill -0 "$2" 2>/dev/null || is_last=1
        now=$(node_statuses "$1")
        [[ $now == "$last" ]] || { echo "$now" >>"$3"; last=$now; }
        [[ $is_last == 0 ]] || return 0
        ((SECONDS < deadline)) || give_up "run-once did not end within $DEADLINE_S s"
        sleep 0.02
    done
}

# The statuses of one batch, in the order in which they were seen.
seen_of_batch() { # BATCH FILE
    tr ' ' '\n' <"$2" | sed -n "s/^$1|\([a-z]*\)|.*/\1/p" | awk '!known[$0]++' | lines
}

# --- What is looked at by curl --------------------------------------------------------------

# Sets STATUS and BODY.
api() { # METHOD PATH [JSON]
    local answer options=(-sS --noproxy '*' -m 15 -X "$1" -w '\n%{http_code}')
    [[ -z ${token:-} ]] || options+=(-H "Authorization: Bearer $token")
    [[ $# -lt 3 ]] || options+=(-H 'Content-Type: application/json' -d "$3")
    answer=$(curl "${options[@]}" "http://$http_addr$2" 2>"$work/curl.log") || true
    STATUS=${answer##*$'\n'} BODY=${answer%$'\n'*}
}

# Prints what a Python expression makes of d, the last answer.
json() {
    "$python" -IS -c 'import json, sys; d = json.loads(sys.argv[1]); print(eval(sys.argv[2]))' "$BODY" "$1" 2>&1 | tail -n 1
}

# The release in one line: its status, then its nodes' statuses by batch.
picture() { # RELEASE
    api GET "/api/v1/releases/$1"
    json 'd["data"]["release"]["status"] + " " + " ".join(
        str(b["batch"]) + ":" + ",".join(n["status"] for n in b["nodes"]) for b in d["data"]["batches"])'
}

watch_release() { # RELEASE FILE; until it is terminal
    local last="" now deadline=$((SECONDS + DEADLINE_S))
    while :; do
        now=$(picture "$1")
        [[ $now == "$last" ]] || { echo "$now" >>"$2"; last=$now; }
        case $now in success* | partial* | failed* | cancelled*) return ;; esac
        ((SECONDS < deadline)) || return 0 # the checks that follow tell what was seen
        sleep 0.05
    done
}

# Starts `serve` and waits until it is ready; sets PID and http_addr.
start_serve() { # EXECUTOR-ENABLED NAME
    http_addr=127.0.0.1:$(free_port)
    RELEASE_EXECUTOR_ENABLED=$1 HTTP_ADDR=$http_addr in_background \
        "${program[@]}" serve >"$work/$2.log" 2>&1
    wait_for "serve to be ready" serve_is_ready
}

serve_is_ready() {
    kill -0 "$PID" 2>/dev/null || give_up "serve ended at its start"
    [[ $(curl -s --noproxy '*' -m 5 -o /dev/null -w '%{http_code}' "http://$http_addr/readyz") == 200 ]]
}

# Stops a process as an operator does; sets CODE.
stop() { # PID
    kill -TERM "$1" 2>/dev/null || true # one that is gone by itself shows by its code
    local deadline=$((SECONDS + 20))
    while kill -0 "$1" 2>/dev/null; do
        ((SECONDS < deadline)) || give_up "${alive[$1]##*/} did not end within 20 s after SIGTERM"
        sleep 0.05
    done
    CODE=0
    await "$1" || CODE=$?
}

# --- Part 1: run-once, by SQL ---------------------------------------------------------------

create_release() { # REASON; sets release and version
    releasectl create --reason "$1" >"$work/create.log" 2>&1 || give_up "create failed"
    release=$(sql "SELECT MAX(id) FROM release_tasks")
    version=$(sql "SELECT version FROM release_tasks WHERE id = $release")
}

# Runs one tick while the nodes are watched; sets CODE.
run_watched() { # RELEASE FILE
    in_background "${program[@]}" run-once >"$work/run-once.log" 2>&1
    watch_nodes "$1" "$PID" "$2"
    CODE=0
    await "$PID" || CODE=$?
}

# Ends what a tick may have left: a tick gives up waiting after an interval without news.
finish() { releasectl run-once --drain >"$work/drain.log" 2>&1 || [[ $? == 1 ]] || give_up "run-once --drain failed"; }

part_by_sql_success() {
    releasectl migrate >"$work/migrate.log" 2>&1 || give_up "migrate failed"
    sql "INSERT INTO nodes (name, main_ip) VALUES ('sql-1', '$subnet.1'), ('sql-2', '$subnet.2'), ('sql-3', '$subnet.3')"
    create_release "acceptance, to succeed"
    equals "create: a release with three online nodes" "1|3" \
        "$(sql "SELECT (SELECT COUNT(*) FROM release_tasks), (SELECT COUNT(*) FROM release_task_nodes WHERE release_task_id = $release)")"
    equals "initial status of release_tasks: pending, version 1, no node counted" "pending|1|3|0|0" \
        "$(sql "SELECT status, version, total_nodes, success_nodes, failed_nodes FROM release_tasks WHERE id = $release")"
    equals "initial status of release_task_nodes: all pending, the first node in batch 1, the others in batch 2" \
        "sql-1|1|pending sql-2|2|pending sql-3|2|pending" \
        "$(sql "SELECT n.name, t.batch, t.status FROM release_task_nodes t JOIN nodes n ON n.id = t.node_id WHERE t.release_task_id = $release ORDER BY n.id" | lines)"

    local seen=$work/seen-success
    node_statuses "$release" >"$seen"
    run_watched "$release" "$seen"
    equals "run-once: exits 0" 0 "$CODE"
    matches "after run-once: the release was started" "(running|success)\|1" \
        "$(sql "SELECT status, started_at LIKE '____-__-__T__:__:__.___Z' FROM release_tasks WHERE id = $release" | sed 's/t$/1/')"
    finish
    equals "batch 1: pending -> running -> success, as seen from outside" "pending running success" "$(seen_of_batch 1 "$seen")"
    equals "batch 1: the same in the history" "pending|running|1 running|success|1" "$(node_changes "$release" 1)"
    equals "batch 2: pending -> running -> success, as seen from outside" "pending running success" "$(seen_of_batch 2 "$seen")"
    equals "batch 2: the same in the history" "pending|running|2 running|success|2" "$(node_changes "$release" 2)"
    equals "batch 2: waits for the success of batch 1" "" "$(grep -E '^1\|(pending|running|failed)' "$seen" | grep -v '2|pending|2$' || true)"
    equals "final status of release_tasks: success, by way of running" "success pending|running running|success" \
        "$(sql "SELECT status FROM release_tasks WHERE id = $release") $(release_changes "$release")"
    equals "success_nodes: 3, as many as rows in that status" "success|3|3|0 3" "$(release_row "$release") $(counted "$release" success)"
    equals "each agent ran its task exactly once" "1:1 2:1 3:1" "$(runs_of "$release")"
    matches "a task's id: apply_config, address, version, tag" "apply_config_$subnet.1_1_[0-9a-f]{8}" \
        "$(sql "SELECT task_id FROM release_task_nodes WHERE release_task_id = $release AND batch = 1")"
    first=$release
}

part_by_sql_failure() {
    set_agent 1 '{"outcome":"failed","message":"nginx -t failed"}'
    create_release "acceptance, to fail"
    equals "the next release: one version higher" 2 "$version"
    run_watched "$release" "$work/seen-failure"
    matches "run-once with a failing node: exits 0 or 1" "0|1" "$CODE"
    finish
    matches "batch 1 made to fail: its node is failed, with the agent's own words" "1\|failed\|agent_failed\|.*nginx -t failed.*" \
        "$(sql "SELECT batch, status, error_kind, error_msg FROM release_task_nodes WHERE release_task_id = $release AND batch = 1")"
    matches "release_tasks: failed, error_msg names the node and its error" "failed\|.*sql-1.*nginx -t failed.*" \
        "$(sql "SELECT status, error_msg FROM release_tasks WHERE id = $release")"
    equals "batch 2: skipped, never started" "skipped|| skipped||" \
        "$(sql "SELECT status, task_id, started_at FROM release_task_nodes WHERE release_task_id = $release AND batch = 2" | lines)"
    equals "failed_nodes: 1, as many as rows in that status; success + failed + skipped = total" "failed|3|0|1 0 1 2" \
        "$(release_row "$release") $(counted "$release" success) $(counted "$release" failed) $(counted "$release" skipped)"
    equals "the history tells it" "pending|running running|failed; pending|running|1 running|failed|1; pending|skipped|2" \
        "$(release_changes "$release"); $(node_changes "$release" 1); $(node_changes "$release" 2)"
    equals "only the failing agent got the task, exactly once" "1:1" "$(runs_of "$release")"

    set_agent 1 '{"outcome":"success","message":""}'
    local before
    before=$(frozen_rows "$first, $release")
    finish
    equals "run-once again: terminal releases stay as they are" "$before" "$(frozen_rows "$first, $release")"
    equals "run-once again: no agent runs anything" "1:1 2:1 3:1; 1:1" "$(runs_of "$first"); $(runs_of "$release")"
}

# --- Part 2: serve, by curl -----------------------------------------------------------------

post_release() { # REASON; sets release and version
    api POST /api/v1/releases "{\"target\":\"cdn\",\"reason\":\"$1\",\"payload\":{}}"
    release=$(json 'd["data"]["releaseId"]') version=$(json 'd["data"]["version"]')
    [[ $release =~ ^[0-9]+$ ]] || release=0
}

part_by_curl_success() {
    local name ids=() real_token
    sql "UPDATE nodes SET enabled = 0" # the nodes of part 1 stay out of it
    start_serve 0 serve-without-executor
    local serve=$PID
    real_token=$token token=""
    api GET /api/v1/releases
    equals "API without a token: 401, code 1001" "401 1001" "$STATUS $(json 'd["code"]')"
    token=$real_token
    for name in 4 5 6; do
        api POST /api/v1/nodes "{\"name\":\"curl-$name\",\"mainIp\":\"$subnet.$name\"}"
        ids+=("$STATUS:$(json 'd["data"]["id"]')")
    done
    matches "POST /api/v1/nodes: three online nodes" "201:[0-9]+ 201:[0-9]+ 201:[0-9]+" "${ids[*]}"
    post_release "acceptance by curl, to succeed"
    equals "POST /api/v1/releases: 201, version 3, two batches" \
        "201 3 3 [(1, [${ids[0]#*:}]), (2, [${ids[1]#*:}, ${ids[2]#*:}])]" \
        "$STATUS $version $(json 'd["data"]["totalNodes"]') $(json '[(b["batch"], b["nodeIds"]) for b in d["data"]["batches"]]')"
    local code=0
    RELEASE_EXECUTOR_ENABLED=0 releasectl run-once >"$work/disabled.log" 2>&1 || code=$?
    equals "run-once with the executor switched off: exits 0 and says so" "0 1" \
        "$code $([[ -s $work/disabled.log ]] && echo 1 || echo 0)"
    equals "GET: pending, and nothing dispatched" "pending 1:pending 2:pending,pending; " "$(picture "$release"); $(runs_of "$release")"
    stop "$serve"
    equals "serve: a clean end after SIGTERM" 0 "$CODE"

    for name in 4 5 6; do set_agent "$name" '{"taskMs":3000}'; done # each batch is looked at, however slow we are
    start_serve 1 executor
    executor=$PID
    local seen=$work/seen-by-curl
    watch_release "$release" "$seen"
    for name in 4 5 6; do set_agent "$name" "{\"taskMs\":$TASK_MS}"; done
    matches "GET with the executor started: running, batch 1 first" "running 1:running 2:pending,pending" "$(grep -m 1 '1:running' "$seen" || cat "$seen")"
    matches "GET: then batch 2" "running 1:success 2:(running|success),(running|success)" "$(grep -m 1 'success 2:[rs]' "$seen" || cat "$seen")"
    equals "GET in the end: success" "success 1:success 2:success,success" "$(picture "$release")"
    api GET "/api/v1/releases/$release"
    equals "GET: successNodes 3, failedNodes 0, skippedNodes 0, currentBatch 0" "3 0 0 0" \
        "$(json '" ".join(str(d["data"]["release"][k]) for k in ("successNodes", "failedNodes", "skippedNodes", "currentBatch"))')"
    equals "each agent ran its task exactly once" "4:1 5:1 6:1" "$(runs_of "$release")"
    success=$release
}

part_by_curl_unreachable() {
    set_agent 4 '{"mode":"refuse"}'
    post_release "acceptance by curl, an agent out of reach"
    equals "POST again, with one agent unreachable: 201" "201 4" "$STATUS $version"
    watch_release "$release" "$work/seen-unreachable"
    matches "GET: failed" "failed 1:failed .*" "$(picture "$release")"
    api GET "/api/v1/releases/$release"
    equals "GET: batch 2 skipped" "skipped skipped" "$(json '" ".join(n["status"] for n in d["data"]["batches"][1]["nodes"])')"
    matches "GET: the node's error is told" "unreachable .+" "$(json '(lambda n: n["errorKind"] + " " + n["errorMsg"])(d["data"]["batches"][0]["nodes"][0])')"
    equals "GET: failedNodes 1, skippedNodes 2" "1 2" \
        "$(json '" ".join(str(d["data"]["release"][k]) for k in ("failedNodes", "skippedNodes"))')"
    equals "no agent ran it" "" "$(runs_of "$release")"
    api GET "/api/v1/releases?pageSize=2"
    equals "GET the list: newest first" "$release $success 4" "$(json '" ".join(str(i["id"]) for i in d["data"]["items"]) + " " + str(d["data"]["total"])')"
    unreachable=$release
}

# Two releases of two targets, both waiting before an executor is there.
part_shared_nodes() {
    local cdn dns
    releasectl freeze on --reason "acceptance: two targets" >/dev/null 2>&1
    post_release "acceptance, the first of two targets"
    cdn=$release
    api POST /api/v1/releases '{"target":"dns","reason":"acceptance, the second of two targets","payload":{}}'
    dns=$(json 'd["data"]["releaseId"]')
    releasectl freeze off >/dev/null 2>&1
    api GET "/api/v1/releases/$dns?view=summary"
    matches "a release that shares nodes with one of another target: waits for it" "waiting for release $cdn, .*" \
        "$(json 'd["data"]["release"]["statusReason"]')"
    watch_release "$dns" "$work/seen-shared"
    equals "both: success" "success 1:success 2:success,success; success 1:success 2:success,success" "$(picture "$cdn"); $(picture "$dns")"
    equals "the second began when the first had ended" 1 \
        "$(sql "SELECT COUNT(*) FROM release_tasks a JOIN release_tasks b ON b.started_at >= a.finished_at WHERE a.id = $cdn AND b.id = $dns")"
    equals "each agent ran both, each once" "4:1 5:1 6:1; 4:1 5:1 6:1" "$(runs_of "$cdn"); $(runs_of "$dns")"
}

part_plans() {
    local before
    before=$(sql "SELECT COUNT(*) FROM release_tasks")
    api POST "/api/v1/releases/$unreachable/retry" '{"dryRun":true}'
    equals "plan of a retry where a newer success is: 409, code 3003" "409 3003" "$STATUS $(json 'd["code"]')"
    api POST "/api/v1/releases/$unreachable/retry" '{"dryRun":true,"overNewer":true}'
    equals "the same with overNewer: 200, the old payload, for all three nodes" "200 $unreachable 3 []" \
        "$STATUS $(json 'd["data"]["payloadOf"]["releaseId"]') $(json 'd["data"]["totalNodes"]') $(json 'd["data"]["leftOut"]')"
    sql "UPDATE nodes SET status = 'maintenance' WHERE name = 'curl-6'"
    api POST /api/v1/releases '{"reason":"acceptance, other content","payload":{"websites":["b.example"]}}'
    release=$(json 'd["data"]["releaseId"]')
    watch_release "$release" "$work/seen-content"
    sql "UPDATE nodes SET status = 'online' WHERE name = 'curl-6'"
    equals "a release of other content to two nodes: success" "success 1:success 2:success" "$(picture "$release")"
    api POST "/api/v1/releases/$release/rollback" '{"dryRun":true}'
    equals "plan of its rollback: 200, the two nodes that it touched, one batch each" "200 2 [1, 1]" \
        "$STATUS $(json 'd["data"]["totalNodes"]') $(json '[len(b["nodeIds"]) for b in d["data"]["batches"]]')"
    equals "plan of its rollback: the payload that they had before" "{}" \
        "$(sql "SELECT payload FROM release_tasks WHERE id = $(json 'd["data"]["payloadOf"]["releaseId"]')")"
    CODE=0
    releasectl rollback "$release" --plan >"$work/plan.log" 2>&1 || CODE=$?
    equals "the same by rollback --plan: exits 0, says whose payload" "0 1" \
        "$CODE $(grep -c '^sends: payload of release ' "$work/plan.log")"
    equals "plans write nothing" "$((before + 1))" "$(sql "SELECT COUNT(*) FROM release_tasks")"
    api POST /api/v1/nodes "{\"name\":\"twin\",\"mainIp\":\"::ffff:$subnet.4\"}"
    equals "one agent as a second node: 409, code 3002" "409 3002" "$STATUS $(json 'd["code"]')"
}

# The node that was in maintenance while the release before went out is brought level.
part_drift() {
    local behind='/api/v1/nodes?drift=behind&name=curl-*' names='[n["name"] for n in d["data"]["items"]]'
    api GET "$behind"
    equals "the node that was in maintenance is behind" "['curl-6']" "$(json "$names")"
    api POST /api/v1/catch-up '{"dryRun":true}'
    equals "plan of a catch-up: the payload that the others have, for this node" "$release ['curl-6']" \
        "$(json 'd["data"]["plans"][0]["payloadOf"]["releaseId"]') $(json 'd["data"]["plans"][0]["batches"][0]["nodeNames"]')"
    api POST /api/v1/catch-up '{"reason":"acceptance, level"}'
    equals "catch-up: 201, of that release" "201 $release" "$STATUS $(json 'd["data"]["releases"][0]["catchUpOf"]')"
    release=$(json 'd["data"]["releases"][0]["releaseId"]')
    watch_release "$release" "$work/seen-level"
    equals "the catch-up: success" "success 1:success" "$(picture "$release")"
    equals "the agent ran it once" "6:1" "$(runs_of "$release")"
    api GET "$behind"
    equals "nobody is behind" "[]" "$(json "$names")"
    api POST /api/v1/catch-up '{}'
    equals "a second catch-up makes nothing" "[]" "$(json 'd["data"]["releases"]')"
}

# That the executors looked is known without a guess at the time: both are there while one more
# release runs to its end.
part_two_executors() {
    local before second
    before=$(frozen_rows "$success, $unreachable")
    set_agent 4 '{"mode":"normal"}'
    stop "$executor"
    equals "the executor: a clean end after SIGTERM" 0 "$CODE"
    start_serve 1 second-executor
    second=$PID
    start_serve 1 executor-again
    executor=$PID
    post_release "acceptance by curl, two executors"
    in_background "${program[@]}" run-once >"$work/beside.log" 2>&1
    local beside=$PID
    watch_release "$release" "$work/seen-two"
    CODE=0
    await "$beside" || CODE=$?
    matches "run-once beside two executors: done, or told to try later" "0|75" "$CODE"
    equals "a release with three executors there: success" "success 1:success 2:success,success" "$(picture "$release")"
    equals "each agent ran its task exactly once" "4:1 5:1 6:1" "$(runs_of "$release")"
    equals "releases that were terminal: not touched" "$before" "$(frozen_rows "$success, $unreachable")"
    equals "releases that were terminal: not run again" "4:1 5:1 6:1; " "$(runs_of "$success"); $(runs_of "$unreachable")"
    part_shared_nodes
    part_plans
    part_drift
    stop "$executor"
    equals "the first executor: a clean end" 0 "$CODE"
    stop "$second"
    equals "the second executor: a clean end" 0 "$CODE"
    equals "no node of any release is left on its way" 0 \
        "$(sql "SELECT COUNT(*) FROM release_task_nodes WHERE status IN ('pending', 'running')")"
}

# --- Part 3: a second, empty database beside the same agents ---------------------------------

# Makes it on the same engine; sets second_url.
make_second_database() {
    if is_postgres; then
        second_database=acceptance_second_$RANDOM$RANDOM
        local server=${DATABASE_URL%%\?*} query=""
        [[ $DATABASE_URL != *\?* ]] || query="?${DATABASE_URL#*\?}"
        sql "CREATE DATABASE $second_database"
        second_url=${server%/*}/$second_database$query
    else
        second_url=sqlite:///$work/second.db
    fi
}

part_second_database() {
    local next ran url=$DATABASE_URL
    sql "UPDATE nodes SET enabled = 0"
    releasectl node add exec-7 "$subnet.7" --port 9090 --protocol execute >/dev/null 2>&1 || give_up "node add failed"
    CODE=0
    releasectl create --reason "acceptance, no payload" >"$work/refused.log" 2>&1 || CODE=$?
    equals "create for an execute node without websites: refused, exits 2" "2 1" "$CODE $(grep -c 'no list websites' "$work/refused.log")"
    echo '{"websites": ["a.example"]}' >"$work/site.json"
    releasectl create --payload "$work/site.json" >/dev/null 2>&1 || give_up "create failed"
    release=$(sql "SELECT MAX(id) FROM release_tasks")
    finish
    equals "the execute node of the first database: success" "success|1|1|0; 7:1" "$(release_row "$release"); $(runs_of "$release")"
    next=$(($(sql "SELECT version FROM release_tasks WHERE id = $release") + 1))

    make_second_database
    DATABASE_URL=$second_url
    releasectl migrate >/dev/null 2>&1 || give_up "migrate failed"
    releasectl node add exec-7 "$subnet.7" --port 9090 --protocol execute >/dev/null 2>&1 || give_up "node add failed"
    ran=$(all_runs_of 7)
    releasectl create --payload "$work/site.json" >/dev/null 2>&1 || give_up "create failed"
    finish
    equals "the first release of an empty database beside the same agent: no success" "failed|1|0|1" "$(release_row 1)"
    equals "it is told why" "rejected|the agent is already at version $((next - 1))" \
        "$(sql "SELECT error_kind, error_msg FROM release_task_nodes WHERE release_task_id = 1")"
    equals "the agent ran nothing for it" "$ran" "$(all_runs_of 7)"
    matches "migrate --first-version: the next release is that version" ".*; the next release is version $next" \
        "$(releasectl migrate --first-version "$next" 2>&1)"
    releasectl create --payload "$work/site.json" >/dev/null 2>&1 || give_up "create failed"
    finish
    equals "then a release really runs" "success|1|1|0 $next; 7:1" \
        "$(release_row 2) $(sql "SELECT version FROM release_tasks WHERE id = 2"); $(runs_of 2)"
    DATABASE_URL=$url
}

# --- The run --------------------------------------------------------------------------------

need curl openssl
need_python
begin_work
compile_program
database_url=${DATABASE_URL:-sqlite:///$work/release.db}
forget_settings
export DATABASE_URL=$database_url
need "$(is_postgres && echo psql || echo sqlite3)"
# Debian's psql is a Perl script that looks for this one, at five times its cost.
psql=psql
for folder in /usr/lib/postgresql/*/bin; do [[ ! -x $folder/psql ]] || psql=$folder/psql; done
cd "$work"
export MTLS_ENABLED=1 RELEASE_EXECUTOR_ENABLED=1 RELEASE_EXECUTOR_INTERVAL_SEC=2
export AGENT_CONNECT_TIMEOUT_SEC=5 AGENT_REQUEST_TIMEOUT_SEC=10 AGENT_RETRIES=1
export CONTROL_CERT=$work/certs/control.crt CONTROL_KEY=$work/certs/control.key CONTROL_CA=$work/certs/ca.crt
token=$("$python" -c 'import secrets; print(secrets.token_hex(16))')
export API_TOKENS_FILE=$work/tokens
(umask 077 && printf 'acceptance:operator:%s\n' "$(printf %s "$token" | sha256sum | cut -d ' ' -f 1)" >"$API_TOKENS_FILE")
if sql "SELECT COUNT(*) FROM release_tasks" >/dev/null 2>&1; then
    give_up "the database was used before: name a fresh one"
fi

echo "# $("$python" -V), ${DATABASE_URL%%:*}"
start_agents 6 1 --task-ms "$TASK_MS"
part_by_sql_success
part_by_sql_failure
part_by_curl_success
part_by_curl_unreachable
part_two_executors
check_histories
part_second_database

echo "$passed passed, $failed failed"
[[ $failed == 0 ]]
