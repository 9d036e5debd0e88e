#!/usr/bin/env bash
# Makes a small certificate authority for tests and laboratories:
#   DIR/ca.crt, ca.key            the authority; reused when ca.key is there
#   DIR/control.crt, control.key  the client certificate of releasectl; kept when it is there
#   DIR/agents/NAME.crt, .key     one server certificate for each NAME, made anew each time
# NAME is an IP address, a host name, or several joined by commas (one
# certificate for all of them; its file is named for the first).
# DAYS (825) is how long they are valid; a negative number makes expired ones.
# The authority itself is always valid, so that only the wanted thing is bad.

set -euo pipefail

readonly CA_DAYS=3650
DAYS=${DAYS:-825}

fail() {
    printf 'make_certs: %s\n' "$1" >&2
    exit 1
}

# run COMMAND...: quiet when it works, one line when it does not.
run() {
    local output
    output=$("$@" 2>&1) || fail "$1 $2 failed: $(printf '%s' "$output" | tail -n 1)"
}

random_serial() {
    # The leading 1 keeps it positive and of one length.
    printf '0x1%s' "$(od -An -N15 -tx1 /dev/urandom | tr -d ' \n')"
}

# A configuration of our own: the system's may add extensions, and twice the
# same extension is refused by strict verification.
write_config() {
    cat >"$work/openssl.cnf" <<'CNF'
[req]
distinguished_name = dn
prompt = no
[dn]
CN = unused
[ca]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign
subjectKeyIdentifier = hash
CNF
}

# write_extensions EKU [NAME,NAME...]
write_extensions() {
    {
        printf 'basicConstraints = critical,CA:FALSE\n'
        printf 'keyUsage = critical,digitalSignature\n'
        printf 'extendedKeyUsage = %s\n' "$1"
        printf 'subjectKeyIdentifier = hash\n'
        printf 'authorityKeyIdentifier = keyid:always\n'
        if [ $# -gt 1 ]; then
            printf 'subjectAltName = @names\n[names]\n'
            printf '%s\n' "$2" | tr ',' '\n' | awk '
                /^[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+$/ || /:/ { print "IP." NR " = " $0; next }
                { print "DNS." NR " = " $0 }'
        fi
    } >"$work/extensions.cnf"
}

make_ca() {
    run openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 \
        -config "$work/openssl.cnf" -extensions ca -subj "/CN=releasectl CA" \
        -set_serial "$(random_serial)" -days "$CA_DAYS" -keyout "$work/key" -out "$work/crt"
    install_pair "$dir/ca"
}

# issue PATH COMMON_NAME: uses the extensions written before.
issue() {
    run openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
        -config "$work/openssl.cnf" -subj "/CN=$2" -keyout "$work/key" -out "$work/csr"
    run openssl x509 -req -sha256 -in "$work/csr" -CA "$dir/ca.crt" -CAkey "$dir/ca.key" \
        -set_serial "$(random_serial)" -days "$DAYS" ${backdate[@]+"${backdate[@]}"} \
        -extfile "$work/extensions.cnf" -out "$work/crt"
    install_pair "$1"
}

install_pair() {
    chmod 600 "$work/key"
    chmod 644 "$work/crt"
    mv -f "$work/key" "$1.key"
    mv -f "$work/crt" "$1.crt"
}

check_arguments() {
    [ $# -ge 2 ] || fail "usage: make_certs.sh DIR NAME [NAME ...]"
    command -v openssl >/dev/null 2>&1 || fail "openssl is not installed"
    [[ $DAYS =~ ^-?[0-9]+$ ]] || fail "DAYS is not a whole number: $DAYS"
    local name
    for name in "${@:2}"; do
        [[ $name =~ ^[A-Za-z0-9:*._-]+(,[A-Za-z0-9:*._-]+)*$ ]] || fail "not an address or host name: $name"
    done
}

check_arguments "$@"
dir=$1
shift
mkdir -p "$dir/agents" 2>/dev/null || fail "can't make the directory $dir/agents"
work=$(mktemp -d "$dir/.make_certs.XXXXXX" 2>/dev/null) || fail "can't write to $dir"
trap 'rm -rf "$work"' EXIT
umask 077
write_config

backdate=()
# OpenSSL 3.4 and newer refuse an end before the start, and can move the start.
if [ "$DAYS" -le 0 ] && openssl x509 -help 2>&1 | grep -e '-not_before' >/dev/null; then
    backdate=(-not_before 20200101000000Z)
fi

made=()
if [ ! -e "$dir/ca.key" ]; then
    make_ca
    made+=(ca)
fi
[ -e "$dir/ca.crt" ] || fail "$dir/ca.key is there, but $dir/ca.crt is not"
if [ ! -e "$dir/control.crt" ] || [ ! -e "$dir/control.key" ]; then
    write_extensions clientAuth
    issue "$dir/control" releasectl
    made+=(control)
fi
for names in "$@"; do
    first=${names%%,*}
    write_extensions serverAuth "$names"
    # A common name has at most 64 characters; the names that count are the SANs.
    issue "$dir/agents/$first" "${first:0:64}"
done
[ $# -eq 1 ] && made+=("1 agent certificate") || made+=("$# agent certificates")
printf 'made in %s: %s\n' "$dir" "$(IFS=,; printf '%s' "${made[*]}" | sed 's/,/, /g')"
