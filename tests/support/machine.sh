#!/usr/bin/env bash
# Becomes the first process of a machine, which ends with it, and it with its standard input.
#
#     unshare --mount --net --pid --uts --ipc --fork --kill-child --mount-proc bash machine.sh NAME FOLDER KEPT …
#
# The machine sees the files of this one and can change none of them; /tmp, /run, /mnt and /dev/shm are its own
# and empty, but for the folders KEPT, which are where they are here. Of FOLDER, homes/NAME is its home folder,
# shared its storage, mounted at /mnt/milp, etc holds its hosts and shadow, and sshd what sshd reads.
# It prints «up» when everything is in its place.
set -euo pipefail

readonly name=$1 folder=$2
readonly kept=("${@:3}") own=(/tmp /run /mnt /dev/shm)
readonly hold=/srv # where folders are, while those that they are in are covered

hostname "$name"
mount -t tmpfs none "$hold"
for number in "${!kept[@]}"; do
  mkdir "$hold/$number"
  mount --bind "${kept[$number]}" "$hold/$number"
  mount -o remount,bind,ro "$hold/$number"
done
mkdir "$hold"/{storage,home}
mount --bind "$folder/shared" "$hold/storage"
mount --bind "$folder/homes/$name" "$hold/home"
cp -rp "$folder/sshd" "$hold"
mount --bind "$folder/etc/hosts" /etc/hosts
mount --bind "$folder/etc/shadow" /etc/shadow

mount -o remount,bind,ro /
for path in "${own[@]}"; do
  mount -t tmpfs -o mode=1777 none "$path"
done
chmod 755 /run /mnt
mount --move "$hold/home" "$HOME"
for number in "${!kept[@]}"; do
  mkdir -p "${kept[$number]}"
  mount --move "$hold/$number" "${kept[$number]}"
done
mkdir -p /mnt/milp
mount --move "$hold/storage" /mnt/milp

cp -rp "$hold/sshd" /run
umount "$hold"
"$(command -v sshd)" -f /run/sshd/config -E /run/sshd/log

# Whatever a machine's first process inherits it has to bury; so ignored, children are gone when they end.
trap '' CHLD
echo up
exec cat > /dev/null
