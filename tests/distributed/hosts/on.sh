#!/bin/bash
# on.sh I COMMAND...: runs a command as if on host rwhI, with its own network, host name and /dev/shm.
set -euo pipefail
host=rwh$1
shift
# shellcheck disable=SC2016  # expanded in the new namespace
exec ip netns exec "$host" unshare --uts --mount --ipc bash -c '
  hostname "$0"
  mount -t tmpfs tmpfs /dev/shm
  exec "$@"' "$host" "$@"
