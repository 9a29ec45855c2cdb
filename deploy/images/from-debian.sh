#!/bin/sh
# Makes the images that tests and compose.yaml need where no image hub can be reached: a Debian by debootstrap, and on it
# RabbitMQ and Prometheus from Debian's packages, and MinIO built from source. Needs root and a Docker daemon.
#
#   deploy/images/from-debian.sh [rabbitmq] [object-store] [prometheus]      (all, if none is named)
#
# An image gets the name that the environment has for it (RABBITMQ_IMAGE, ...), else one of its own. Prints the names as
# lines for a shell. How this machine reaches its package registries goes into the base: Debian's mirrors, apt's settings
# for connections, and the certificates in /usr/local/share/ca-certificates.
set -eu
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-.venv/bin/python}
SUITE=bookworm
WORKER_BASE_IMAGE=${WORKER_BASE_IMAGE:-wrk-model-manager/debian:$SUITE}
RABBITMQ_IMAGE=${RABBITMQ_IMAGE:-wrk-model-manager/rabbitmq:$SUITE}
OBJECT_STORE_IMAGE=${OBJECT_STORE_IMAGE:-wrk-model-manager/object-store:$SUITE}
PROMETHEUS_IMAGE=${PROMETHEUS_IMAGE:-wrk-model-manager/prometheus:$SUITE}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf 'images: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# Runs a command quietly; what it printed is shown only if it fails.
quietly() {
    if ! "$@" >"$work/log" 2>&1; then
        tail -n 40 "$work/log" >&2
        fail "failed: $*"
    fi
}

# The mirrors of this machine if it is a Debian of the same suite, as lines of a sources.list.
mirrors() {
    command -v apt-get >/dev/null 2>&1 &&
        apt-get indextargets --format '$(ORIGIN) deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        sed -n "/ $SUITE/s/^Debian //p"
}

base() {
    [ "$(id -u)" -eq 0 ] || fail "debootstrap needs root"
    command -v debootstrap >/dev/null 2>&1 || fail "debootstrap is missing: apt-get install debootstrap"
    sources=$(mirrors) || true
    mirror=$(printf '%s\n' "$sources" | sed -n "s/^deb \(.*\) $SUITE main\$/\1/p" | head -n 1)
    root=$work/root
    quietly debootstrap --variant=minbase --include=ca-certificates "$SUITE" "$root" ${mirror:+"$mirror"}
    [ -z "$sources" ] || printf '%s\n' "$sources" >"$root/etc/apt/sources.list"
    apt-config dump | grep -E '^Acquire::(https?|Check|Retries)' >"$root/etc/apt/apt.conf.d/90connections" || true
    if [ -n "$(find /usr/local/share/ca-certificates -name '*.crt' 2>/dev/null)" ]; then
        cp -RL /usr/local/share/ca-certificates "$root/usr/local/share/"
        quietly chroot "$root" update-ca-certificates
    fi
    # A package that is installed does not start its service.
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod 755 "$root/usr/sbin/policy-rc.d"
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root/etc/resolv.conf"
    tar -C "$root" --one-file-system -c . | docker import - "$WORKER_BASE_IMAGE" >/dev/null
    rm -rf "$root"
}

# Builds a folder's Dockerfile on our base. Build arguments that have no value here are left out.
build() {
    quietly docker build --network host --tag "$1" --build-arg "BASE=$WORKER_BASE_IMAGE" \
        --build-arg "GO_IMAGE=$WORKER_BASE_IMAGE" --build-arg GOPROXY "$2"
}

object_store() {
    program=$("$PYTHON" -c 'from deploy.local.minio import minio; print(minio())') || fail "MinIO cannot be built"
    mkdir "$work/object-store"
    cp deploy/images/object-store/Dockerfile "$work/object-store/"
    cp "$program" "$work/object-store/minio"
    build "$OBJECT_STORE_IMAGE" "$work/object-store"
}

docker info >/dev/null 2>&1 || fail "no Docker daemon answers: start one, or set DOCKER_HOST"
[ $# -gt 0 ] || set -- rabbitmq object-store prometheus
if ! docker image inspect "$WORKER_BASE_IMAGE" >/dev/null 2>&1; then
    say "making $WORKER_BASE_IMAGE"
    base
fi
echo "export WORKER_BASE_IMAGE=$WORKER_BASE_IMAGE"
for image in "$@"; do
    case $image in
    rabbitmq) name=RABBITMQ_IMAGE tag=$RABBITMQ_IMAGE ;;
    object-store) name=OBJECT_STORE_IMAGE tag=$OBJECT_STORE_IMAGE ;;
    prometheus) name=PROMETHEUS_IMAGE tag=$PROMETHEUS_IMAGE ;;
    *) fail "no such image: $image" ;;
    esac
    say "making $tag"
    if [ "$image" = object-store ]; then object_store; else build "$tag" "deploy/images/$image"; fi
    echo "export $name=$tag"
done
