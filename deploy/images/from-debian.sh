#!/bin/sh
# Makes the images that tests and compose.yaml need where no image hub can be reached: a Debian by debootstrap, and on it
# RabbitMQ and Prometheus from Debian's packages, and MinIO built from source. Needs root and a Docker daemon.
#
#   deploy/images/from-debian.sh [rabbitmq] [object-store] [prometheus]      (all, if none is named)
#
# An image gets the name that the environment has for it (RABBITMQ_IMAGE, ...), else one of its own. Prints the names as
# lines for a shell. RABBITMQ_SUITE is the Debian whose RabbitMQ it is: bookworm has 3.10, trixie 4.0, sid a newer one.
set -eu
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-.venv/bin/python}
SUITE=bookworm
RABBITMQ_SUITE=${RABBITMQ_SUITE:-$SUITE}
WORKER_BASE_IMAGE=${WORKER_BASE_IMAGE:-wrk-model-manager/debian:$SUITE}
RABBITMQ_IMAGE=${RABBITMQ_IMAGE:-wrk-model-manager/rabbitmq:$RABBITMQ_SUITE}
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

# An image of a bare Debian, unless it is there.
base() {
    ! docker image inspect "$2" >/dev/null 2>&1 || return 0
    say "making $2"
    quietly deploy/images/debian-root.sh "$1" "$work/root"
    tar -C "$work/root" --one-file-system -c . | docker import - "$2" >/dev/null
    rm -rf "$work/root"
}

# Builds a folder's Dockerfile on a base. Build arguments that have no value here are left out.
build() {
    quietly docker build --network host --tag "$1" --build-arg "BASE=$3" \
        --build-arg "GO_IMAGE=$3" --build-arg GOPROXY "$2"
}

rabbitmq() {
    base_image=$WORKER_BASE_IMAGE
    [ "$RABBITMQ_SUITE" = "$SUITE" ] || base_image=wrk-model-manager/debian:$RABBITMQ_SUITE
    base "$RABBITMQ_SUITE" "$base_image"
    build "$RABBITMQ_IMAGE" deploy/images/rabbitmq "$base_image"
}

object_store() {
    program=$("$PYTHON" -c 'from deploy.local.minio import minio; print(minio())') || fail "MinIO cannot be built"
    mkdir "$work/object-store"
    cp deploy/images/object-store/Dockerfile "$work/object-store/"
    cp "$program" "$work/object-store/minio"
    build "$OBJECT_STORE_IMAGE" "$work/object-store" "$WORKER_BASE_IMAGE"
}

docker info >/dev/null 2>&1 || fail "no Docker daemon answers: start one, or set DOCKER_HOST"
[ $# -gt 0 ] || set -- rabbitmq object-store prometheus
base "$SUITE" "$WORKER_BASE_IMAGE"
echo "export WORKER_BASE_IMAGE=$WORKER_BASE_IMAGE"
for image in "$@"; do
    case $image in
    rabbitmq) name=RABBITMQ_IMAGE tag=$RABBITMQ_IMAGE ;;
    object-store) name=OBJECT_STORE_IMAGE tag=$OBJECT_STORE_IMAGE ;;
    prometheus) name=PROMETHEUS_IMAGE tag=$PROMETHEUS_IMAGE ;;
    *) fail "no such image: $image" ;;
    esac
    say "making $tag"
    case $image in
    rabbitmq) rabbitmq ;;
    object-store) object_store ;;
    *) build "$tag" "deploy/images/$image" "$WORKER_BASE_IMAGE" ;;
    esac
    echo "export $name=$tag"
done
