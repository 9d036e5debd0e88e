#!/usr/bin/env bash
# Installs releasectl on this host (`make install`), or removes what that installed (`make uninstall`). Both can be
# repeated. It needs Python and the usual tools, no network, and nothing that is not in the archive of `make dist`.
#
#   scripts/install.sh install | uninstall
#
#   PREFIX      where the program lies (/usr/local): bin, lib/releasectl, share, and the units in lib/systemd/system
#   SYSCONFDIR  where its settings lie (/etc): releasectl/releasectl.conf, which is never overwritten nor removed
#   DESTDIR     a folder that stands for / while a package is made; no user is made then
#   PYTHON      the command that runs it (python3): a name is looked for in the PATH of whoever calls releasectl, a path
#               is kept whole
set -euo pipefail
# shellcheck source=scripts/lab.sh
source "$(dirname "${BASH_SOURCE[0]}")/lab.sh"
cd "$lab_root"
umask 022

prefix=${PREFIX:-/usr/local} sysconf=${SYSCONFDIR:-/etc} dest=${DESTDIR:-}
command=${PYTHON:-python3}
prefix=${prefix%/} sysconf=${sysconf%/} dest=${dest%/}
bin=$prefix/bin lib=$prefix/lib/releasectl units=$prefix/lib/systemd/system doc=$prefix/share/doc/releasectl
man=$prefix/share/man/man1
completions=("bash $prefix/share/bash-completion/completions/releasectl" "zsh $prefix/share/zsh/site-functions/_releasectl"
    "fish $prefix/share/fish/vendor_completions.d/releasectl.fish")
config=$sysconf/releasectl/releasectl.conf

# Writes standard input to a file all at once: a process that starts meanwhile reads the old one or the new one.
put() { # MODE PATH
    mkdir -p "$dest${2%/*}"
    cat >"$dest$2.new"
    chmod "$1" "$dest$2.new"
    mv -f "$dest$2.new" "$dest$2"
}

# The line with which the system starts Python: by its path, or as PATH has it. -I: no module of the environment's or
# the current folder's.
interpreter() {
    case $command in
        /*) echo "$command -I" ;;
        */*) echo "$python -I" ;;
        *) echo "/usr/bin/env -S $command -I" ;;
    esac
}

launcher() {
    echo "#!$(interpreter)"
    echo '"""Runs releasectl as a module, of which Python keeps what it compiled: a script is compiled anew each time."""'
    echo 'import gc'
    [[ $sysconf == /etc ]] || echo 'import os'
    printf 'import sys\n\ngc.disable()  # while all is imported; run_process() enables it\nsys.path.insert(0, "%s")\n' "$lib"
    if [[ $sysconf != /etc ]]; then
        printf 'os.environ.setdefault("RELEASECTL_CONFIG", "%s")\n' "$config"
    fi
    printf 'import releasectl\n\nreleasectl.run_process()\n'
}

# The script that completes the installed command, which is compiled by then.
completion() { # SHELL
    RELEASECTL_CONFIG=/dev/null "$python" -I -B -c 'import sys; sys.path.insert(0, sys.argv[2]); import releasectl
print(releasectl.completion_script(sys.argv[1], command="releasectl"))' "$1" "$dest$lib"
}

install_all() {
    local file line shell
    [[ $prefix$sysconf =~ ^[/A-Za-z0-9._+~-]+$ && $prefix == /* && $sysconf == /* ]] ||
        die 2 "PREFIX and SYSCONFDIR are absolute paths of letters, digits and . _ + ~ -"
    mkdir -p "$dest$lib" "$dest${config%/*}" || die 3 "name folders that you may write with PREFIX and SYSCONFDIR, or be root"
    for file in schema.sql dashboard.html releasectl.py; do put 644 "$lib/$file" <"$file"; done
    # By the content, not by the time of the source: packages and copies change times. An edited source, and a Python
    # that comes later, are then compiled anew by each command, or once by root.
    "$python" -I -c 'import importlib.util, py_compile, sys
source, shown = sys.argv[1:]
py_compile.compile(source, importlib.util.cache_from_source(source), shown, doraise=True,
                   invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)' "$dest$lib/releasectl.py" "$lib/releasectl.py"
    launcher | put 755 "$bin/releasectl"
    put 644 "$man/releasectl.1" <docs/releasectl.1
    for line in "${completions[@]}"; do
        shell=${line%% *}
        completion "$shell" | put 644 "${line#* }"
    done
    for file in docs/systemd/*; do
        sed -e "s|/usr/local/bin/|$bin/|; s|/usr/local/share/doc/releasectl|$doc|; s|/etc/releasectl/|$sysconf/releasectl/|" \
            "$file" | put 644 "$units/${file##*/}"
    done
    for file in README.md README.zh-CN.md CHANGELOG.md LICENSE docs/*.md docs/*.yml docs/*.json docs/*.svg docs/*.png; do
        put 644 "$doc/$file" <"$file"
    done
    if [[ -e $dest$config ]]; then
        say "$config is left as it is"
    else
        "$python" -I scripts/sample_config.py "${config%/*}" | put 644 "$config"
    fi
    if [[ -z $dest && $(id -u) == 0 ]]; then
        sh scripts/account.sh "${config%/*}"
        if [[ -d /run/systemd/system ]]; then systemctl daemon-reload; fi
        say "installed $("$bin/releasectl" --version) in $prefix; the settings are in $config"
        [[ -e /run/systemd/system ]] || return 0
        if systemctl --quiet is-active releasectl; then
            say "systemctl restart releasectl: until then the version before runs on"
        else
            say "systemctl enable --now releasectl: starts the service"
        fi
    elif [[ -z $dest ]]; then
        say "installed in $prefix; not as root, so there is no user for the service: see scripts/account.sh"
    fi
}

uninstall_all() {
    local file line
    if [[ ! -e $dest$bin/releasectl && ! -e $dest$lib ]]; then
        say "nothing is installed in $dest$prefix: PREFIX says where it is"
        return
    fi
    for file in docs/systemd/*; do
        if [[ -z $dest && -d /run/systemd/system && -e $units/${file##*/} ]]; then
            systemctl --quiet disable --now "${file##*/}" 2>/dev/null || true
        fi
        rm -f "$dest$units/${file##*/}"
    done
    if [[ -z $dest && -d /run/systemd/system ]]; then systemctl daemon-reload; fi
    for line in "${completions[@]}"; do rm -f "$dest${line#* }"; done
    rm -f "$dest$bin/releasectl" "$dest$man/releasectl.1"
    rm -rf "$dest$lib" "$dest$doc"
    if [[ -z $dest ]]; then
        say "removed; left are ${config%/*} (settings), /var/lib/releasectl (data) and the user releasectl"
    fi
}

PYTHON=$command need_python
case ${1:-} in
    install) install_all ;;
    uninstall) uninstall_all ;;
    *) die 2 "install or uninstall" ;;
esac
