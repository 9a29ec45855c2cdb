#!/bin/sh
# Makes the secrets that compose.yaml needs, each in a file, in deploy/secrets or the folder that is named; those that are
# there are kept. To change one, remove its file and those made of it, run this again, then `docker-compose up`.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$here/secrets}
# The containers run as other users; they read the files as members of the group that owns them.
umask 027

random() { od -An -N 24 -t x1 /dev/urandom | tr -d ' \n'; }

# Writes a file, unless there is one already.
make() { [ -s "$folder/$1" ] || printf '%s\n' "$2" >"$folder/$1"; }

# The address of the broker with a user's name and password.
address() { printf 'amqp://%s:%s@rabbitmq:5672/model-manager' "$1" "$(cat "$folder/broker/$1")"; }

mkdir -p "$folder/broker"
for user in worker-rack-1 worker-rack-2 orchestrator inference uploader listener operator monitoring; do
    make "broker/$user" "$(random)"
done
make amqp-rack-1 "$(address worker-rack-1)"
make amqp-rack-2 "$(address worker-rack-2)"
make amqp-orchestrator "$(address orchestrator)"
make amqp-listener "$(address listener)"
make http-token "$(random)"
make s3-root-user "root-$(random | cut -c 1-8)"
make s3-root-password "$(random)"
make s3-credentials "[default]
aws_access_key_id = $(cat "$folder/s3-root-user")
aws_secret_access_key = $(cat "$folder/s3-root-password")"
make grafana-password "$(random)"

# Compose reads it from beside compose.yaml.
[ $# -gt 0 ] || [ -e "$here/.env" ] || printf 'SECRETS_GID=%s\n' "$(id -g)" >"$here/.env"
echo "secrets: in $folder"
