#!/bin/bash
# Removes the hosts of up.sh with every process in them, and the bridge.
num_hosts=${1:-2}
for ((i = 0; i < num_hosts; i++)); do
  host=rwh$i
  for pid in $(ip netns pids "$host" 2>/dev/null); do kill -9 "$pid" 2>/dev/null; done
  ip netns del "$host" 2>/dev/null
  ip link del "rwveth$i" 2>/dev/null
  rm -rf "/etc/netns/$host"
done
ip link del rwbridge 2>/dev/null
true
