#!/usr/bin/env bash
# Makes dist/releasectl_VERSION_all.deb (`make deb`) around `make install`, with dpkg-deb alone. The same tree gives the
# same bytes with SOURCE_DATE_EPOCH.
#
#   DEB_VERSION     another version than the program's, such as 0.0.9
#   MAINTAINER      "Name <mail>", of the control file
set -euo pipefail
# shellcheck source=scripts/lab.sh
source "$(dirname "${BASH_SOURCE[0]}")/lab.sh"
cd "$lab_root"
umask 022
need dpkg-deb gzip
begin_work
version=${DEB_VERSION:-$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' releasectl.py)}
maintainer=${MAINTAINER:-releasectl <releasectl@example.org>}
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y releasectl.py)}
tree=$work/tree doc=usr/share/doc/releasectl

DESTDIR=$tree PREFIX=/usr SYSCONFDIR=/etc PYTHON=/usr/bin/python3 bash scripts/install.sh install 2>"$work/install.log" ||
    give_up "the installation into a folder failed"
rm -rf "$tree/usr/lib/releasectl/__pycache__" # postinst compiles for the Python that is there
install -m 755 scripts/account.sh "$tree/usr/lib/releasectl/account.sh"
# No conffile, of which dpkg would ask at every upgrade, as each setting that is new changes it.
mv "$tree/etc/releasectl/releasectl.conf" "$tree/usr/lib/releasectl/releasectl.conf"
rmdir "$tree/etc/releasectl" "$tree/etc"
install -D -m 755 scripts/debian/rtupdate "$tree/usr/share/python3/runtime.d/releasectl.rtupdate"
install -d "$tree/usr/share/zsh/vendor-completions"
mv "$tree/usr/share/zsh/site-functions/_releasectl" "$tree/usr/share/zsh/vendor-completions/"
rmdir "$tree/usr/share/zsh/site-functions"
install -d "$tree/lib/systemd"
mv "$tree/usr/lib/systemd/system" "$tree/lib/systemd/" # a unit's place until Debian 13
rmdir "$tree/usr/lib/systemd"
gzip -9n "$tree/usr/share/man/man1/releasectl.1"
{
    printf 'releasectl (%s) unstable; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- %s  %s\n' "$version" "$maintainer" \
        "$(LC_ALL=C date -uR -d "@$SOURCE_DATE_EPOCH")"
} | gzip -9n >"$tree/$doc/changelog.gz"
mv "$tree/$doc/LICENSE" "$tree/$doc/copyright"

install -d "$tree/DEBIAN"
install -m 755 scripts/debian/postinst scripts/debian/prerm scripts/debian/postrm "$tree/DEBIAN"
size=$(du -sk --apparent-size --exclude=DEBIAN "$tree" | cut -f1)
sed -e "s|@VERSION@|$version|; s|@MAINTAINER@|$maintainer|; s|@SIZE@|$size|" scripts/debian/control.in \
    >"$tree/DEBIAN/control"
(cd "$tree" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | LC_ALL=C sort -z | xargs -0 md5sum >DEBIAN/md5sums)
mkdir -p dist
package=dist/releasectl_${version}_all.deb
dpkg-deb --root-owner-group -Zxz --build "$tree" "$package.new" >"$work/dpkg-deb.log" 2>&1 || give_up "dpkg-deb failed"
mv "$package.new" "$package"
echo "$package"
