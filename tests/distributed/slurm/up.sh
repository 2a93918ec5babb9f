#!/bin/bash
# Starts a real Slurm (slurmctld, munged, one slurmd per host of ../hosts/up.sh) without systemd and cgroups.
#   up.sh FOLDER [NUM_HOSTS [CPUS_PER_HOST]]      everything is written under FOLDER; afterwards: . FOLDER/env.sh
# Needs root, CAP_NET_ADMIN and Debian's packages slurm-wlm and munge.
set -euo pipefail
base=$1 num_hosts=${2:-2} cpus=${3:-2}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$base"/{state,log,pid,spool}

# Debian's package makes the key; munged refuses to run as root.
if ! timeout 5 munge -n >/dev/null 2>&1; then
  mkdir -p /run/munge /var/lib/munge /var/log/munge
  chown munge: /run/munge /var/lib/munge /var/log/munge
  chmod 755 /run/munge
  setpriv --reuid=munge --regid=munge --init-groups munged --pid-file=/run/munge/munged.pid
  cp /run/munge/munged.pid "$base/pid/munged.pid"
  for ((i = 0; i < 50; i++)); do
    if timeout 2 munge -n >/dev/null 2>&1; then break; fi
    sleep 0.2
  done
fi

"$here/../hosts/up.sh" "$num_hosts"
nodes=
for ((i = 0; i < num_hosts; i++)); do
  mkdir -p "$base/spool/rwh$i"
  nodes+="NodeName=rwh$i NodeAddr=10.77.0.$((10 + i)) CPUs=$cpus Sockets=1 CoresPerSocket=$cpus RealMemory=4096 State=UNKNOWN"$'\n'
done
cat >"$base/slurm.conf" <<CONF
ClusterName=rwtest
SlurmctldHost=rwcontrol(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool/%n
SlurmctldPidFile=$base/pid/slurmctld.pid
SlurmdPidFile=$base/pid/slurmd.%n.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
# A node may claim more CPUs than this machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# The signal of --signal also comes before a pre-emption.
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
KillWait=30
MinJobAge=600
Waittime=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$nodes
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
# Without this, slurmd looks for a mounted cgroup file system, which a network namespace does not have.
echo "CgroupPlugin=cgroup/v1" >"$base/cgroup.conf"
echo "export SLURM_CONF=$base/slurm.conf" >"$base/env.sh"
export SLURM_CONF=$base/slurm.conf

alive() { [ -s "$base/pid/$1.pid" ] && kill -0 "$(cat "$base/pid/$1.pid")" 2>/dev/null; }

# The daemons compare the host name with the configured one, and go into the background by themselves.
if ! alive slurmctld; then
  unshare --uts bash -c "hostname rwcontrol; exec slurmctld -f '$base/slurm.conf'"
fi
for ((i = 0; i < num_hosts; i++)); do
  if ! alive "slurmd.rwh$i"; then "$here/../hosts/on.sh" "$i" slurmd -N "rwh$i" -f "$base/slurm.conf"; fi
done
for ((i = 0; i < 120; i++)); do
  idle=$(timeout 5 sinfo -h -p low -t idle -o %D 2>/dev/null || echo 0)
  if [ "${idle:-0}" = "$num_hosts" ]; then exit 0; fi
  if ((i % 20 == 19)); then timeout 5 scontrol update nodename="rwh[0-$((num_hosts - 1))]" state=resume || true; fi
  sleep 0.5
done
echo "Slurm is not ready after 60 s" >&2
tail -n 5 "$base"/log/*.log >&2
exit 1
