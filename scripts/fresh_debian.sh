#!/usr/bin/env bash
# The README's `make demo` and `make test` on a Debian that has only python3, make and openssl; before these, without a
# network, the package of `make deb` and `make install` (scripts/fresh_install.sh), and the commands of the documents
# (scripts/run_docs.py). Archive and package are made in a copy: dist/ stays as it is.
#
#   scripts/fresh_debian.sh [ARGUMENT OF PYTEST ...]       such as tests/test_cli.py, for a part of the tests
#
# Root makes that Debian in a folder (debootstrap, from the mirror that apt uses here). In it an ordinary
# user unpacks the archive of `make dist` in a folder with a space in its name; there is no /etc/hosts,
# and SIGINT is ignored, as in a background job. `make test` must name the command that it misses, and go
# on after it. Exit codes: 0 all passed, 1 a check failed, 3 something is missing.
set -euo pipefail

# shellcheck source=scripts/lab.sh
source "$(dirname "${BASH_SOURCE[0]}")/lab.sh"
cd "$lab_root"

readonly PLACE="/home/newcomer/a place"

# Prints the folders that pip's configuration names: packages may lie there, in place of an index.
package_folders() {
    { python3 -m pip config list 2>/dev/null || true; env | grep '^PIP_' || true; } |
        grep -oE "/[^ ,'\"]+" | while read -r path; do
            path=/${path##//*/} # of file:///folder the folder
            [[ ! -d $path || $path == /etc/* ]] || readlink -f "$path"
        done | sort -u
}

# Runs a command in that Debian, in namespaces that take its mounts and processes with them.
inside() { # USER COMMAND
    unshare --mount --pid --fork --kill-child bash "$work/inside" "$root" "$@" "${folders[@]+"${folders[@]}"}"
}

inside_without_network() { # USER COMMAND
    unshare --net --mount --pid --fork --kill-child bash "$work/inside" "$root" "$@"
}

as_newcomer() { inside newcomer "cd '$PLACE'/releasectl-*; trap '' INT; $1"; } # COMMAND

[[ $(id -u) == 0 ]] || die 3 "only root can make a Debian in a folder"
need apt-get debootstrap make setpriv unshare
begin_work
root=$work/root
if [[ -e .git ]]; then git clone --quiet . "$work/copy"; else cp -R . "$work/copy"; fi
cd "$work/copy"
rm -rf dist
mapfile -t folders < <(package_folders)
cat >"$work/inside" <<'INSIDE'
set -euo pipefail
root=$1 user=$2 command=$3
shift 3
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
for folder; do
    mkdir -p "$root$folder"
    mount --bind "$folder" "$root$folder"
done
mapfile -t pip < <(env | grep '^PIP_')
exec chroot "$root" setpriv --reuid "$user" --regid "$user" --init-groups env -i "HOME=/home/$user" \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "${pip[@]+"${pip[@]}"}" bash -euc "$command"
INSIDE

suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
# shellcheck disable=SC2016 # apt-get fills it in
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | sed -n 1p)
echo "# a Debian ($suite) with python3, make and openssl"
debootstrap --variant=minbase --include=python3,make,openssl,ca-certificates "$suite" "$root" "$mirror" \
    >"$work/debootstrap.log" 2>&1 || give_up "debootstrap failed"
for file in /etc/resolv.conf /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
    [[ ! -f $file ]] || cp -L "$file" "$root$file"
done
rm -f "$root/etc/hosts"
chroot "$root" useradd --create-home newcomer

make dist >"$work/dist.log" 2>&1 || give_up "make dist failed"
mkdir "$root$PLACE"
tar -C "$root$PLACE" -xzf dist/releasectl-*.tar.gz
chroot "$root" chown -R newcomer "$PLACE"

echo "# the package, make install"
DEB_VERSION=0.0.9 make deb >"$work/deb.log" 2>&1 || give_up "make deb failed"
make deb >>"$work/deb.log" 2>&1 || give_up "make deb failed"
mv dist/releasectl_0.0.9_all.deb "$root/root/old.deb"
cp dist/releasectl_*_all.deb "$root/root/new.deb"
cp -R "$root$PLACE"/releasectl-* "$root/root/archive"
inside_without_network root "/root/archive/scripts/fresh_install.sh /root/old.deb /root/new.deb" || die 1 "the installation failed"

echo "# the documents"
mkdir "$root/root/here"
openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$work/key" 2>/dev/null
SIGN_KEY=$work/key make dist >"$work/dist.log" 2>&1 || give_up "make dist failed"
openssl pkey -in "$work/key" -pubout -out "$root/root/here/releasectl.pub"
cp dist/releasectl-*.tar.gz dist/releasectl-*.json dist/SHA256SUMS* "$root/root/here"
chroot "$root" userdel releasectl
rm -rf "$root/etc/releasectl" "$root/var/lib/releasectl"
inside_without_network root "python3 -I -B /root/archive/scripts/run_docs.py --throwaway-host /root/here; exit \$?" ||
    die 1 "a document does not do what it says"

echo "# make demo"
as_newcomer "make demo" >"$work/demo.log" 2>&1 || give_up "make demo failed"

for _ in 1 2 3; do
    echo "# make test"
    as_newcomer "make test WORKERS=4 ARGS='$*'" 2>&1 | tee "$work/test.log" && exit 0
    missing=$(sed -n 's/^    sudo \(apt-get .*\)/\1/p' "$work/test.log")
    [[ -n $missing ]] || die 1 "make test failed, and names no command that would mend it"
    as_newcomer "! ls .venv/stamp-python*" >/dev/null 2>&1 || die 1 "there is a stamp of an environment that is of no use"
    echo "# $missing"
    inside root "apt-get update && DEBIAN_FRONTEND=noninteractive $missing" >"$work/apt.log" 2>&1 || give_up "$missing failed"
done
die 1 "make test asks for more and more"
