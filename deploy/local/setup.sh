#!/bin/sh
# Makes .venv as uv.lock says. Needs a python3 of 3.11 or later; brings its own uv where there is none, and on Debian,
# as root, the package that python3 needs for that. Quiet while all is well, apart from one line for each step.
set -eu

UV_VERSION=0.13.9
cache="${XDG_CACHE_HOME:-$HOME/.cache}/model-manager"
tools="$cache/uv-$UV_VERSION"

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# Runs a command quietly; what it printed is shown only if it fails.
quietly() {
    log=$(mktemp)
    if "$@" >"$log" 2>&1; then
        rm -f "$log"
    else
        status=$?
        cat "$log" >&2
        rm -f "$log"
        return "$status"
    fi
}

find_uv() {
    if command -v uv >/dev/null 2>&1; then
        uv=uv
    elif [ -x "$tools/bin/uv" ]; then
        uv="$tools/bin/uv"
    else
        return 1
    fi
}

install_venv_package() {
    [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1 ||
        fail "python3 has no ensurepip: install python3-venv (or uv, https://docs.astral.sh/uv/), then run make again"
    say "installing python3-venv with apt-get"
    quietly apt-get -o DPkg::Lock::Timeout=300 update -qq
    quietly env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -qq --yes \
        --no-install-recommends python3-venv
}

install_uv() {
    python3 -c 'import ensurepip' 2>/dev/null || install_venv_package
    say "installing uv $UV_VERSION in $tools"
    mkdir -p "$cache"
    rm -rf "$tools"
    quietly python3 -m venv "$tools" &&
        quietly "$tools/bin/python" -m pip install --disable-pip-version-check "uv==$UV_VERSION" || {
        rm -rf "$tools"
        fail "uv could not be installed"
    }
    uv="$tools/bin/uv"
}

command -v python3 >/dev/null 2>&1 || fail "python3 is missing: install Python 3.11 or later"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "python3 is older than 3.11: install a later one"
find_uv || install_uv
say "bringing .venv in line with uv.lock"
UV_PYTHON_DOWNLOADS=never "$uv" sync --frozen --quiet --python python3
