#!/usr/bin/env bash
# Installs, upgrades and removes releasectl on a Debian without a network, by its package and by `make install`.
# scripts/fresh_debian.sh runs it there as root; on a host that somebody uses it would remove what is installed.
#
#   scripts/fresh_install.sh OLD.deb NEW.deb      beside it lies the unpacked archive
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
old=$1 new=$2
conf=/etc/releasectl/releasectl.conf data=/var/lib/releasectl

expect() { # WHAT COMMAND...: it succeeds
    local what=$1
    shift
    "$@" >/tmp/said 2>&1 || { echo "fresh_install.sh: $what failed: $*"; cat /tmp/said; exit 1; }
}

refuse() { # WHAT COMMAND...: it fails
    local what=$1
    shift
    ! "$@" >/tmp/said 2>&1 || { echo "fresh_install.sh: $what: $*"; cat /tmp/said; exit 1; }
}

says() { grep -qF -- "$1" /tmp/said || { echo "fresh_install.sh: nothing says \"$1\" in:"; cat /tmp/said; exit 1; }; }

looks() { # PATH OWNER:GROUP MODE
    [[ $(stat -c '%U:%G %a' "$1") == "$2 $3" ]] || { stat "$1"; echo "fresh_install.sh: $1 is not $2 $3"; exit 1; }
}

as_service() { setpriv --reuid releasectl --regid releasectl --init-groups "$@"; }

runs() { # what an installed one can do, at once
    expect "migrate" releasectl migrate
    looks "$data/releasectl.db" releasectl:releasectl 600
    expect "the service's user" as_service releasectl node list
    expect "check" bash -c 'releasectl check || [[ $? == 2 ]]'
    says "from $conf: DATABASE_URL"
    looks "$conf" root:releasectl 640
    looks "${conf%/*}" root:releasectl 750
    looks "$data" releasectl:releasectl 750
    refuse "a stranger read the settings" setpriv --reuid nobody --regid nogroup --clear-groups releasectl list
    says "$conf can't be read: permission denied"
}

refuse "there is a network" bash -c '</dev/tcp/192.0.2.1/9'

echo "# the package: installed"
expect "dpkg -i" dpkg -i "$old"
runs
test -e /usr/lib/releasectl/__pycache__/*.pyc
expect "node add" releasectl node add edge-1 10.0.0.7
echo "LOG_LEVEL=debug" >>"$conf"
cp "$conf" /tmp/conf

echo "# upgraded"
expect "the upgrade" dpkg -i "$new"
cmp "$conf" /tmp/conf
expect "node list" releasectl node list
says edge-1
runs

echo "# removed"
expect "dpkg -r" dpkg -r releasectl
[[ ! -e /usr/bin/releasectl ]]
[[ -e $conf && -e $data/releasectl.db && ! -e /usr/lib/releasectl ]]
expect "installed again" dpkg -i "$new"
expect "node list" releasectl node list
says edge-1

echo "# purged"
touch "${conf%/*}/tokens"
expect "dpkg -P" dpkg -P releasectl
says "kept are /var/lib/releasectl"
[[ ! -e $conf && -e ${conf%/*}/tokens && -e $data/releasectl.db ]]
rm -r "${conf%/*}"

if command -v make >/dev/null; then
    echo "# make install, again, and make uninstall"
    hash -r
    expect "make install" make install
    runs
    expect "node list" releasectl node list
    says edge-1
    echo "LOG_LEVEL=debug" >>"$conf"
    cp "$conf" /tmp/conf
    expect "make install again" make install
    cmp "$conf" /tmp/conf
    expect "make uninstall" make uninstall
    [[ -e $conf && -e $data/releasectl.db && ! -e /usr/local/lib/releasectl && ! -e /usr/local/bin/releasectl ]]
fi
