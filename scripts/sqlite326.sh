#!/usr/bin/env bash
# Builds SQLite 3.26, the oldest that releasectl supports (RHEL 8), as DIR/libsqlite3.so.0.
#
#   export LD_LIBRARY_PATH=$(scripts/sqlite326.sh DIR)
#   python3.9 -c 'import sqlite3; print(sqlite3.sqlite_version)'        # 3.26.0
#
# The source is the one that the npm package sqlite3 4.0.6 carries. Prints DIR's full path.
# Exit codes: 0 done, 1 failed, 2 wrong usage, 3 npm or gcc is missing.
set -euo pipefail

# shellcheck source=scripts/lab.sh
source "$(dirname "${BASH_SOURCE[0]}")/lab.sh"

SOURCE=sqlite-autoconf-3260000
SOURCE_SHA256=5daa6a3fb7d1e8c767cd59c4ded8da6e4b00c61d3b466d0685e35c4dd6d7bf5d

[[ $# == 1 && $1 != -* ]] || die 2 "usage: scripts/sqlite326.sh DIR"
need npm gcc tar sha256sum
mkdir -p "$1"
dir=$(readlink -f "$1")

if [[ ! -f $dir/libsqlite3.so.0 ]]; then
    begin_work
    cd "$work"
    npm pack --silent sqlite3@4.0.6 >/dev/null || die 1 "npm could not fetch the package sqlite3 4.0.6"
    tar -xzf sqlite3-4.0.6.tgz "package/deps/$SOURCE.tar.gz"
    echo "$SOURCE_SHA256  package/deps/$SOURCE.tar.gz" | sha256sum --check --quiet >&2
    tar -xzf "package/deps/$SOURCE.tar.gz" "$SOURCE/sqlite3.c"
    gcc -O1 -w -shared -fPIC -Wl,-soname,libsqlite3.so.0 \
        -DSQLITE_THREADSAFE=1 -DSQLITE_ENABLE_COLUMN_METADATA \
        -o libsqlite3.so.0 "$SOURCE/sqlite3.c" -ldl -lpthread -lm
    mv libsqlite3.so.0 "$dir/"
fi
echo "$dir"
