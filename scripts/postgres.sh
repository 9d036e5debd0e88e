#!/usr/bin/env bash
# A throwaway PostgreSQL server for tests and trials; see usage() for the commands.
#
# The server listens on 127.0.0.1 only and trusts whoever connects: never put data into it that
# matters. initdb refuses to run as root, so root's server runs as `postgres` or `nobody`, whose
# way to DIR may be barred (pytest makes its folders 0700): the cluster is then in a folder of its
# own under /tmp, and DIR/cluster names it.
set -euo pipefail

# shellcheck source=scripts/lab.sh
source "$(dirname "${BASH_SOURCE[0]}")/lab.sh"

READY_WITHIN_S=60
ENOUGH_MEMORY_MB=1024
SOCKET_PATH_MAX=80 # of the 107 bytes that a socket's path may have, the rest is for its name

usage() {
    cat <<'TEXT'
usage: scripts/postgres.sh start [--durable|--in-memory] DIR
                                                   start a server, print its URL (again: the same server);
                                                   --in-memory: its data in /dev/shm, where that has 1 GB
       scripts/postgres.sh url DIR                 print the URL
       scripts/postgres.sh restart DIR             stop it if it runs, start it on the same port
       scripts/postgres.sh standby [--port N] PRIMARYDIR DIR
                                                   start a standby of it (asynchronous), print its URL
       scripts/postgres.sh promote DIR             make a primary of a standby, print its URL
       scripts/postgres.sh crash DIR               stop it as a loss of power would, keep its data
       scripts/postgres.sh stop DIR                stop it, keep its data
       scripts/postgres.sh remove DIR              stop it, delete its data
       scripts/postgres.sh install                 install PostgreSQL from Debian's packages if missing
exit codes: 0 done, 1 failed, 2 wrong usage, 3 PostgreSQL is not installed
TEXT
}

# Prints the folder that holds initdb, pg_ctl and postgres; fails when there is none.
find_binaries() {
    local found folder
    if found=$(command -v initdb); then
        folder=$(dirname "$(readlink -f "$found")")
        [[ -x $folder/pg_ctl && -x $folder/postgres ]] && { echo "$folder"; return; }
    fi
    for folder in $(printf '%s\n' /usr/lib/postgresql/*/bin | sort -rV); do
        [[ -x $folder/initdb && -x $folder/pg_ctl && -x $folder/postgres ]] && { echo "$folder"; return; }
    done
    return 1
}

need_binaries() {
    BIN=$(find_binaries) ||
        die 3 "PostgreSQL's server is not installed: apt-get install postgresql (or scripts/postgres.sh install)"
}

# Sets RUN_AS to the command prefix under which the server may run, OWNER to its user ("" for ourselves).
choose_owner() {
    RUN_AS=() OWNER=""
    [[ $(id -u) == 0 ]] || return 0
    if id postgres >/dev/null 2>&1; then OWNER=postgres; else OWNER=nobody; fi
    if command -v setpriv >/dev/null; then
        RUN_AS=(setpriv "--reuid=$(id -u "$OWNER")" "--regid=$(id -g "$OWNER")" --clear-groups)
    else
        RUN_AS=(runuser -u "$OWNER" --)
    fi
}

has_memory() {
    [[ -w /dev/shm && $(df --output=avail --block-size=1M /dev/shm | tail -n 1) -ge $ENOUGH_MEMORY_MB ]]
}

# Makes a folder for the cluster and prints it.
make_home() { # DIR KIND
    local home=$1 parent=/tmp
    if [[ $2 == --in-memory ]] && has_memory; then parent=/dev/shm home=""; fi
    if [[ -z $home || -n $OWNER || ${#home} -gt $SOCKET_PATH_MAX ]]; then
        home=$(mktemp -d "$parent/releasectl-pg.XXXXXX")
        [[ -z $OWNER ]] || chown "$OWNER" "$home"
    fi
    echo "$home"
}

write_settings() { # FILE SOCKET_FOLDER KIND
    cat >>"$1" <<TEXT

# scripts/postgres.sh
listen_addresses = '127.0.0.1'
unix_socket_directories = '$2'
max_connections = 200
log_line_prefix = '%m [%p] '
include_if_exists = 'port.conf'
TEXT
    [[ $3 == --durable ]] || printf 'fsync = off\nfull_page_writes = off\n' >>"$1"
}

# pg_ctl for this DIR; the server keeps the log open, so no pipe of our caller stays open with it.
control() {
    "${RUN_AS[@]}" "$BIN/pg_ctl" -D "$DATA" -w -t "$READY_WITHIN_S" "$@" </dev/null >>"$LOG" 2>&1
}

is_running() { "${RUN_AS[@]}" "$BIN/pg_ctl" -D "$DATA" status >/dev/null 2>&1; }

port() { sed -n 's/^port = //p' "$DATA/port.conf"; }

url() { echo "postgresql://releasectl@127.0.0.1:$(port)/releasectl"; }

# Sets DIR, LOG, HOME_DIR and DATA of an existing server.
open_dir() {
    DIR=$(readlink -m "$1") LOG=$(readlink -m "$1")/log
    [[ -f $DIR/cluster ]] || die 1 "$1 holds no server of ours"
    HOME_DIR=$(<"$DIR/cluster") DATA=$(<"$DIR/cluster")/data
    cd / # the server's user may not be able to enter where we are
}

create_cluster() ( # KIND; a subshell, so that undo_start still speaks to our caller
    exec >>"$LOG" 2>&1
    "${RUN_AS[@]}" "$BIN/initdb" -D "$DATA" -U releasectl -A trust -E UTF8 --no-locale --no-sync
    write_settings "$DATA/postgresql.conf" "$HOME_DIR" "$1"
    echo 'CREATE DATABASE releasectl;' | "${RUN_AS[@]}" "$BIN/postgres" --single -D "$DATA" postgres
)

# Starts on a free port; another program may take the port just before us, hence the tries.
start_on_free_port() {
    local try
    for try in 1 2 3 4 5; do
        echo "port = $(free_port)" >"$DATA/port.conf"
        control start && return
        say "try $try did not start"
    done
    return 1
}

undo_start() {
    local code=$?
    [[ $code == 0 ]] && return
    say "could not start; the end of $LOG:"
    tail -n 15 "$LOG" >&2 || true
    control stop -m immediate || true
    rm -rf "${HOME_DIR:?}/data" "$DIR/cluster"
    [[ $HOME_DIR == "$DIR" ]] || rm -rf "${HOME_DIR:?}"
    exit 1
}

start() {
    local kind=""
    case ${1:-} in --durable | --in-memory) kind=$1; shift ;; esac
    [[ $# == 1 ]] || { usage >&2; exit 2; }
    need_binaries
    choose_owner
    if [[ -f $1/cluster ]]; then
        open_dir "$1"
        is_running || control start || die 1 "could not start; see $LOG"
        url
        return
    fi
    new_dir "$1" "$kind"
    create_cluster "$kind"
    start_on_free_port
    echo "$HOME_DIR" >"$DIR/cluster"
    url
}

# Sets DIR, LOG, HOME_DIR and DATA of a server that is to be; what fails from here on is undone.
new_dir() { # DIR [KIND]
    mkdir -p "$1"
    DIR=$(readlink -f "$1") LOG=$(readlink -f "$1")/log
    : >"$LOG"
    HOME_DIR=$(make_home "$DIR" "${2:-}")
    DATA=$HOME_DIR/data
    trap undo_start EXIT
    trap 'exit 130' INT TERM HUP
    cd /
}

# Copies a running server to DATA; the copy will ask it for all that comes later.
copy_cluster() ( # PRIMARY_PORT; a subshell, so that undo_start still speaks to our caller
    exec >>"$LOG" 2>&1
    "${RUN_AS[@]}" "$BIN/pg_basebackup" -D "$DATA" -c fast -X stream -R --no-sync \
        -d "host=127.0.0.1 port=$1 user=releasectl"
    cat >>"$DATA/postgresql.conf" <<TEXT

# scripts/postgres.sh standby
unix_socket_directories = '$HOME_DIR'
wal_retrieve_retry_interval = '200ms'
TEXT
)

standby() {
    local port="" primary_port
    [[ ${1:-} != --port ]] || { port=${2:-}; shift 2; }
    [[ $# == 2 && $port =~ ^[0-9]*$ ]] || { usage >&2; exit 2; }
    [[ ! -f $2/cluster ]] || die 1 "$2 holds a server already"
    open_dir "$1"
    primary_port=$(port)
    cd - >/dev/null # the second folder may be named relative to where we were
    new_dir "$2"
    copy_cluster "$primary_port"
    if [[ -n $port ]]; then
        is_free "$port" || say "port $port is taken"
        echo "port = $port" >"$DATA/port.conf"
        control start
    else
        start_on_free_port
    fi
    echo "$HOME_DIR" >"$DIR/cluster"
    url
}

promote() {
    open_dir "$1"
    [[ -f $DATA/standby.signal ]] || die 1 "$1 is no standby"
    control promote || die 1 "could not promote; see $LOG"
    url
}

crash() {
    open_dir "$1"
    is_running || return 0
    control stop -m immediate || die 1 "could not stop; see $LOG"
}

restart() {
    open_dir "$1"
    control restart -m fast || die 1 "could not restart; see $LOG"
}

stop() {
    open_dir "$1"
    is_running || return 0
    control stop -m fast || die 1 "could not stop; see $LOG"
}

remove() {
    stop "$1"
    rm -rf "${HOME_DIR:?}/data" "$DIR/cluster"
    [[ $HOME_DIR == "$DIR" ]] || rm -rf "${HOME_DIR:?}"
}

# Installs the server without the cluster that Debian's package would create and start.
install_package() {
    if find_binaries >/dev/null && command -v psql >/dev/null; then return; fi
    [[ $(id -u) == 0 ]] || die 3 "PostgreSQL is missing, and only root can install it: apt-get install postgresql"
    command -v apt-get >/dev/null || die 3 "PostgreSQL is missing, and there is no apt-get here: install it by hand"
    local conf=/etc/postgresql-common/createcluster.conf
    export DEBIAN_FRONTEND=noninteractive
    {
        apt-get update -q &&
            apt-get install -y -q --no-install-recommends postgresql-common &&
            cp -p "$conf" "$conf.releasectl" &&
            sed -i -E 's/^#?create_main_cluster.*/create_main_cluster = false/' "$conf" &&
            apt-get install -y -q --no-install-recommends postgresql postgresql-client
    } >&2 || say "apt-get failed"
    [[ ! -f $conf.releasectl ]] || mv "$conf.releasectl" "$conf"
    need_binaries
}

command=${1:-}
[[ $# == 0 ]] || shift
case $command in
    start) start "$@" ;;
    install) install_package ;;
    standby)
        need_binaries
        choose_owner
        standby "$@"
        ;;
    url | restart | promote | crash | stop | remove)
        [[ $# == 1 ]] || { usage >&2; exit 2; }
        need_binaries
        choose_owner
        if [[ $command == url ]]; then open_dir "$1"; fi
        "$command" "$@"
        ;;
    -h | --help | help) usage ;;
    *) usage >&2; exit 2 ;;
esac
