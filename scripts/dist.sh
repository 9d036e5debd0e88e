#!/usr/bin/env bash
# Makes dist/releasectl-VERSION.tar.gz and dist/SHA256SUMS (`make dist`): what a host without
# internet needs, and the demonstration. The same files give the same bytes, whoever makes it.
#
# In the archive SHA256SUMS names every file, for `sha256sum -c SHA256SUMS` after unpacking.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export LC_ALL=C TZ=UTC

readonly FILES=(releasectl.py schema.sql docs Makefile README.md README.zh-CN.md CHANGELOG.md CONTRIBUTING.md LICENSE
    scripts/demo.sh scripts/fake_agent.py scripts/make_certs.sh)

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' releasectl.py)
name=releasectl-$version
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir -p dist "$work/$name"
cp -R --parents "${FILES[@]}" "$work/$name"
cd "$work/$name"
find . -type f ! -name SHA256SUMS -printf '%P\0' | sort -z | xargs -0 sha256sum >SHA256SUMS
cd "$OLDPWD"
# A fixed time: SOURCE_DATE_EPOCH, else that of the last commit, else that of no clock at all.
seconds=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
tar -C "$work" --sort=name --format=ustar --mtime="@$seconds" --owner=0 --group=0 --numeric-owner \
    --mode=u=rwX,go=rX -cf - "$name" | gzip -9n >"dist/$name.tar.gz.new"
mv "dist/$name.tar.gz.new" "dist/$name.tar.gz"
(cd dist && sha256sum "$name.tar.gz" >SHA256SUMS)
cat dist/SHA256SUMS
