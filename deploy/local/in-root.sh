#!/bin/sh
# Runs a command with the programs and the /etc of another Debian, whose folder is given, and with all else of this machine
# in its place: processes, devices, and every file under its own name. Called in a mount namespace of its own, with which
# the mounts end.
#
#   unshare --mount in-root.sh ROOT COMMAND...
set -eu

root=$1
shift
for folder in /*; do
    case $folder in /usr | /etc | /boot | /bin | /sbin | /lib*) continue ;; esac
    [ -d "$folder" ] && [ ! -L "$folder" ] || continue
    mkdir -p "$root$folder"
    mount --rbind "$folder" "$root$folder"
done
exec chroot "$root" "$@"
