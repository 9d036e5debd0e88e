# shellcheck shell=bash
# What the shell scripts share; they source it, right after `set -euo pipefail`.
#
# A script may set GIVE_UP_CODE (1), the exit code of give_up, and DEADLINE_S (60), for wait_for; and
# may define undo(), for what is to be undone at the end beside the processes and the folder.

lab_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# --- Messages -------------------------------------------------------------------------------

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() { say "$2"; exit "$1"; } # EXIT-CODE MESSAGE

# Ends the script with a message, and shows the ends of the logs in the folder.
give_up() { # MESSAGE
    local log
    say "$1"
    for log in "$work"/*.log; do
        [[ ! -s $log ]] || { echo "--- the end of ${log##*/}:"; tail -n 15 "$log"; } >&2
    done
    exit "${GIVE_UP_CODE:-1}"
}

need() { # PROGRAM...
    local program
    for program in "$@"; do
        command -v "$program" >/dev/null || die 3 "$program is missing: install it"
    done
}

# --- A folder, and processes in the background: both are gone at the end ------------------------

declare -A alive=() # process id -> the command

# Sets work, a new folder.
begin_work() {
    work=$(mktemp -d -t "releasectl-${0##*/}.XXXXXX")
    trap end_work EXIT
    trap 'exit 130' INT TERM HUP
}

end_work() {
    local pid
    for pid in "${!alive[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
    for pid in "${!alive[@]}"; do
        for _ in {1..100}; do kill -0 -- "-$pid" 2>/dev/null || break; sleep 0.1; done
        kill -KILL -- "-$pid" 2>/dev/null || true
    done
    if declare -F undo >/dev/null; then undo; fi
    rm -rf "$work"
}

# Starts a command in a process group of its own, where SIGINT is not ignored; sets PID.
in_background() { # COMMAND...
    set -m
    "$@" </dev/null &
    PID=$!
    set +m
    alive[$PID]=$*
}

# Waits for the end of what in_background started; returns its exit code. Signals to us are answered meanwhile.
await() { # PID
    local code=0
    wait "$1" || code=$?
    unset "alive[$1]"
    return "$code"
}

wait_for() { # WHAT COMMAND...
    local what=$1 deadline=$((SECONDS + ${DEADLINE_S:-60}))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || give_up "waited ${DEADLINE_S:-60} s in vain for $what"
        sleep 0.05
    done
}

# --- Ports ----------------------------------------------------------------------------------

is_free() { ! (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; } # PORT

# Prints a free port below the range that the kernel gives to clients, so that nobody takes it soon.
free_port() {
    local port
    while :; do
        port=$((RANDOM % 16000 + 16000))
        ! is_free "$port" || { echo "$port"; return; }
    done
}

# --- releasectl and its agents ----------------------------------------------------------------

# Sets python, the full path of what PYTHON names.
need_python() {
    python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable if sys.version_info >= (3, 9) else "")') || python=""
    [[ -n $python ]] || die 3 "${PYTHON:-python3} is not Python 3.9 or newer: name one with PYTHON=..."
}

# Sets program, the words that run releasectl: as the module that `make install` makes of it, with what Python compiled
# of it. Python compiles a script anew at each start, which is most of what a short command takes.
compile_program() {
    mkdir "$work/program"
    ln -s "$lab_root/releasectl.py" "$work/program/releasectl.py"
    "$python" -m py_compile "$work/program/releasectl.py"
    program=(env "PYTHONPATH=$work/program" "$python" -m releasectl)
}

releasectl() { "${program[@]}" "$@"; }

# Unsets all settings, and whatever file has some: those of this shell and this host are not for a laboratory.
forget_settings() {
    local name
    while read -r name; do unset "$name"; done < <("$python" -c 'import sys; sys.path.insert(0, sys.argv[1])
import releasectl; print(*(s.name for s in releasectl.SETTINGS), sep="\n")' "$work/program")
    export RELEASECTL_CONFIG=/dev/null
}

# Starts stand-in agents at the addresses $subnet.1, $subnet.2, ...: the first ones speak the dialect `tasks` at
# port 8443, the others `execute` at 9090. Sets subnet and control, the address of their control server.
# Another laboratory may have the same addresses, hence the tries.
start_agents() { # TASKS EXECUTE [OPTION-OF-FAKE_AGENT...]
    local tasks=$1 all=$(($1 + $2)) n addresses
    shift 2
    for _ in 1 2 3 4 5; do
        subnet=127.$((RANDOM % 253 + 1)).$((RANDOM % 254 + 1)) control=127.0.0.1:$(free_port) addresses=()
        for ((n = 1; n <= all; n++)); do addresses+=("$subnet.$n"); done
        bash "$lab_root/scripts/make_certs.sh" "$work/certs" "${addresses[@]}" >"$work/certs.log" 2>&1 ||
            give_up "scripts/make_certs.sh failed"
        in_background "$python" "$lab_root/scripts/fake_agent.py" --certs "$work/certs" --control "$control" \
            --listen "$subnet.1-$subnet.$tasks:8443" --listen "$subnet.$((tasks + 1))-$subnet.$all:9090,execute" "$@" \
            >"$work/agents.log" 2>&1
        wait_for "the agents" agents_settled
        if grep -q '^ready:' "$work/agents.log"; then return; fi
        unset "alive[$PID]"
    done
    give_up "the agents did not start in 5 tries"
}

agents_settled() { grep -q '^ready:' "$work/agents.log" || ! kill -0 "$PID" 2>/dev/null; }

set_agent() { # NUMBER JSON
    "$python" -c 'import http.client, sys
agents = http.client.HTTPConnection(sys.argv[1], timeout=10)
agents.request("PUT", "/agents/" + sys.argv[2], sys.argv[3])
sys.exit(agents.getresponse().status != 200)' "$control" "$subnet.$1" "$2" || give_up "could not change the agent $subnet.$1"
}
