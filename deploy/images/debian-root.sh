#!/bin/sh
# Makes a Debian in a new folder: the least of a suite by debootstrap, and the packages that are named. Needs root.
#
#   deploy/images/debian-root.sh SUITE FOLDER [PACKAGE...]
#
# How this machine reaches its package registries goes into it: Debian's mirrors, apt's settings for connections, and the
# certificates in /usr/local/share/ca-certificates.
set -eu

suite=$1 root=$2
shift 2

fail() { printf 'debian-root: %s\n' "$*" >&2; exit 1; }

# The mirrors of this machine if it is a Debian, as lines of a sources.list.
mirrors() {
    command -v apt-get >/dev/null 2>&1 &&
        apt-get indextargets --format '$(ORIGIN) deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        sed -n 's/^Debian //p'
}

[ "$(id -u)" -eq 0 ] || fail "debootstrap needs root"
command -v debootstrap >/dev/null 2>&1 || fail "debootstrap is missing: apt-get install debootstrap"
sources=$(mirrors) || true
# A release's name without a dash is that of a whole suite; its mirror has the others too.
mirror=$(printf '%s\n' "$sources" | sed -n 's/^deb \(.*\) [a-z]* main$/\1/p' | head -n 1)
debootstrap --variant=minbase --include=ca-certificates "$suite" "$root" ${mirror:+"$mirror"}
# Of its own suite this machine knows more than debootstrap: the updates.
! printf '%s\n' "$sources" | grep " $suite" >"$root/own.list" || mv "$root/own.list" "$root/etc/apt/sources.list"
rm -f "$root/own.list"
apt-config dump 2>/dev/null | grep -E '^Acquire::(https?|Check|Retries)' >"$root/etc/apt/apt.conf.d/90connections" || true
if [ -n "$(find /usr/local/share/ca-certificates -name '*.crt' 2>/dev/null)" ]; then
    cp -RL /usr/local/share/ca-certificates "$root/usr/local/share/"
    chroot "$root" update-ca-certificates
fi
# Erlang looks its own name up.
[ -s "$root/etc/hosts" ] || printf '127.0.0.1 localhost\n' >"$root/etc/hosts"
# A package that is installed does not start its service.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
if [ $# -gt 0 ]; then
    chroot "$root" apt-get update -qq
    chroot "$root" env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "$@"
fi
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root/etc/resolv.conf"
