#!/bin/bash
# Makes N "hosts" on one machine: network namespaces rwh0 .. with an address each (10.77.0.10 ..), a real bridge
# between them (10.77.0.1) and their own /etc/hosts. Needs root and CAP_NET_ADMIN. May be repeated.
set -euo pipefail
num_hosts=${1:-2}

if ! ip link show rwbridge >/dev/null 2>&1; then
  ip link add rwbridge type bridge
  ip addr add 10.77.0.1/24 dev rwbridge
  ip link set rwbridge up
fi
for ((i = 0; i < num_hosts; i++)); do
  host=rwh$i
  [ -e "/run/netns/$host" ] || ip netns add "$host"
  if ! ip -n "$host" link show eth0 >/dev/null 2>&1; then
    ip link add "rwveth$i" type veth peer name eth0 netns "$host"
    ip link set "rwveth$i" master rwbridge up
    ip -n "$host" addr add "10.77.0.$((10 + i))/24" dev eth0
    ip -n "$host" link set lo up
    ip -n "$host" link set eth0 up
  fi
  # `ip netns exec` mounts this file over /etc/hosts.
  mkdir -p "/etc/netns/$host"
  {
    echo "127.0.0.1 localhost"
    echo "10.77.0.1 rwcontrol"
    for ((j = 0; j < num_hosts; j++)); do echo "10.77.0.$((10 + j)) rwh$j"; done
  } >"/etc/netns/$host/hosts"
done
