#!/bin/bash
# Ends exactly the daemons that up.sh started (by their pid files), then removes the hosts.
base=$1 num_hosts=${2:-2}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export SLURM_CONF=$base/slurm.conf

# The number in a file that a killed test run left may belong to another program by now.
alive() {
  [ -s "$1" ] && case $(cat "/proc/$(cat "$1")/comm" 2>/dev/null) in slurmctld | slurmd | munged) ;; *) false ;; esac
}

if alive "$base/pid/slurmctld.pid"; then
  timeout 10 scancel -u root 2>/dev/null
  sleep 1
fi
for file in "$base"/pid/*.pid; do if alive "$file"; then kill "$(cat "$file")" 2>/dev/null; fi; done
for ((i = 0; i < 20; i++)); do
  left=0
  for file in "$base"/pid/*.pid; do if alive "$file"; then left=1; fi; done
  if [ "$left" = 0 ]; then break; fi
  sleep 0.5
done
for file in "$base"/pid/*.pid; do if alive "$file"; then kill -9 "$(cat "$file")" 2>/dev/null; fi; done
rm -f "$base"/pid/*.pid
"$here/../hosts/down.sh" "$num_hosts"
