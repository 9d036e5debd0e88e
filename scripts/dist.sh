#!/usr/bin/env bash
# Makes dist/releasectl-VERSION.tar.gz (`make dist`): what a host without internet needs, the
# demonstration and the tests; beside it dist/releasectl-VERSION.cdx.json, the list of what is in it (an SBOM,
# CycloneDX 1.5), and dist/SHA256SUMS of both. The same commit gives the same bytes, whoever makes it.
#
#   SIGN_KEY=FILE  a private key, RSA or EC in PEM: dist/SHA256SUMS.sig is made, by openssl
#
# In a clone it packs what is committed, and says what is left out; elsewhere (an unpacked archive)
# what lies here. In the archive SHA256SUMS names every file, for `sha256sum -c SHA256SUMS` after unpacking.
set -euo pipefail
# shellcheck source=scripts/lab.sh
source "$(dirname "${BASH_SOURCE[0]}")/lab.sh"
cd "$lab_root"
export LC_ALL=C TZ=UTC
umask 022

readonly FILES=(releasectl.py schema.sql dashboard.html docs Makefile README.md README.zh-CN.md CHANGELOG.md CONTRIBUTING.md LICENSE
    pyproject.toml scripts tests)

begin_work
mkdir -p dist "$work/tree"
rm -f dist/SHA256SUMS.sig

if [[ -e .git ]]; then
    git archive --format=tar HEAD -- "${FILES[@]}" | tar -xf - -C "$work/tree"
    git status --porcelain -- "${FILES[@]}" | sed 's/^/dist.sh: not committed, so not as it lies here: /' >&2
    commit=$(git rev-parse HEAD) committed_at=$(git log -1 --format=%ct)
else
    say "no clone: packing what lies here, committed or not"
    cp -R --parents "${FILES[@]}" "$work/tree"
    find "$work/tree" -name __pycache__ -prune -exec rm -rf {} +
    commit="" committed_at=0
fi
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$work/tree/releasectl.py")
name=releasectl-$version
mv "$work/tree" "$work/$name"
# A fixed time: SOURCE_DATE_EPOCH, else that of the commit, else that of no clock at all.
seconds=${SOURCE_DATE_EPOCH:-$committed_at}

"${PYTHON:-python3}" -I - "$work/$name" "$version" "$seconds" "$commit" >"$work/sbom" <<'SBOM'
import datetime, hashlib, json, pathlib, sys, uuid
folder, version, seconds, commit = sys.argv[1:]
licence = [{"license": {"id": "MIT"}}]
files = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
listed = [{"type": "file", "name": str(path.relative_to(folder)), "version": version, "licenses": licence,
           "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(path.read_bytes()).hexdigest()}]} for path in files]
serial = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(listed))  # of the same files the same
made_at = datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
program = {"type": "application", "bom-ref": "releasectl", "name": "releasectl", "version": version, "licenses": licence}
if commit:
    program["properties"] = [{"name": "git:commit", "value": commit}]
# No dependencies: the standard library of Python alone, and a PostgreSQL driver where the operator installs one.
print(json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.5", "serialNumber": f"urn:uuid:{serial}", "version": 1,
                  "metadata": {"timestamp": made_at, "component": program}, "components": listed,
                  "dependencies": [{"ref": "releasectl", "dependsOn": []}]}, indent=1))
SBOM
cp "$work/sbom" "$work/$name/sbom.cdx.json"

cd "$work/$name"
find . -type f ! -name SHA256SUMS -printf '%P\0' | sort -z | xargs -0 sha256sum >"$work/sums"
mv "$work/sums" SHA256SUMS
cd "$OLDPWD"
tar -C "$work" --sort=name --format=ustar --mtime="@$seconds" --owner=0 --group=0 --numeric-owner \
    --mode=u=rwX,go=rX -cf - "$name" | gzip -9n >"dist/$name.tar.gz.new"
mv "dist/$name.tar.gz.new" "dist/$name.tar.gz"
cp "$work/sbom" "dist/$name.cdx.json"
(cd dist && sha256sum "$name.tar.gz" "$name.cdx.json" >SHA256SUMS)
if [[ -n ${SIGN_KEY:-} ]]; then
    openssl dgst -sha256 -sign "$SIGN_KEY" -out dist/SHA256SUMS.sig dist/SHA256SUMS
fi
cat dist/SHA256SUMS
