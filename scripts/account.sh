#!/bin/sh
# Makes the user that the service runs as, and the folders of its settings and data: part of `make install`, and of
# the Debian package's postinst. What is there keeps its owner and mode.
#
#   scripts/account.sh [FOLDER OF THE SETTINGS]      (/etc/releasectl)
set -eu

settings=${1:-/etc/releasectl}
data=/var/lib/releasectl

if ! getent passwd releasectl >/dev/null; then
    getent group releasectl >/dev/null || groupadd --system releasectl
    useradd --system --gid releasectl --home-dir "$data" --no-create-home --shell /usr/sbin/nologin \
        --comment "release executor" releasectl
fi
[ -d "$data" ] || install -d -o releasectl -g releasectl -m 0750 "$data"
# Made by who installs the files, so still root's: the settings name files with secrets, and may hold some.
if [ "$(stat -c %U:%G "$settings")" = root:root ]; then
    chgrp releasectl "$settings"
    chmod 0750 "$settings"
fi
if [ -f "$settings/releasectl.conf" ] && [ "$(stat -c %U:%G "$settings/releasectl.conf")" = root:root ]; then
    chgrp releasectl "$settings/releasectl.conf"
    chmod 0640 "$settings/releasectl.conf"
fi
