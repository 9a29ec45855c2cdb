#!/bin/sh
# Makes the secrets that compose.yaml needs, each in a file, in deploy/secrets or the folder that is named; those that are
# there are kept. To change one, remove its file and those made of it and run this again; deploy/README.md tells the rest.
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

# A pair of keys for the object store, as a profile in a file of AWS credentials.
pair() { printf '[%s]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$1" "$2" "$3"; }

mkdir -p "$folder/broker"
for user in worker-rack-1 worker-rack-2 orchestrator inference uploader listener operator monitoring; do
    make "broker/$user" "$(random)"
done
for rack in rack-1 rack-2; do
    make "amqp-$rack" "$(address "worker-$rack")"
    # A name that is new each time lets the old pair be used until the new one is.
    mark=$(random | cut -c 1-8)
    make "s3-$rack" "$(pair default "$rack-$mark" "$(random)"; pair clean-up "$rack-clean-up-$mark" "$(random)")"
done
make amqp-orchestrator "$(address orchestrator)"
make amqp-listener "$(address listener)"
make http-token "$(random)"
make s3-root-user "root-$(random | cut -c 1-8)"
make s3-root-password "$(random)"
make s3-administrator "$(pair default "$(cat "$folder/s3-root-user")" "$(cat "$folder/s3-root-password")")"
make grafana-password "$(random)"

# Compose reads it from beside compose.yaml.
[ $# -gt 0 ] || [ -e "$here/.env" ] || printf 'SECRETS_GID=%s\n' "$(id -g)" >"$here/.env"
echo "secrets: in $folder"
