#!/bin/bash
# A Slurm of two nodes on this machine, for the tests marked `slurm` and for trying a launcher without a cluster.
#
#   tests/slurm/setup.sh install         Debian's packages (as root; the tests never do this by themselves)
#   tests/slurm/setup.sh start FOLDER    writes FOLDER/slurm.conf and starts the daemons; FOLDER with a short path: a socket lies in it
#   tests/slurm/setup.sh stop FOLDER     ends its jobs and its daemons
#
# Then: export SLURM_CONF=FOLDER/slurm.conf MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo PATH=FOLDER/bin:$PATH
# (the nodes' names n1 and n2 do not resolve; FOLDER/bin/sacct answers in place of an accounting database).
set -euo pipefail

install() {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
}

configure() {
    local cpus="${CPUS:-2}" port="${PORT:-16817}"
    mkdir -p "$D"/{bin,state,run,log,spool/n1,spool/n2}
    chmod 755 "$D" "$D/run"
    [ -s "$D/munge.key" ] || (umask 077 && dd if=/dev/urandom of="$D/munge.key" bs=128 count=1 status=none)
    cat > "$D/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=$port
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again starts after seconds; by default it waits for two minutes.
AuthInfo=socket=$D/run/munge.socket,cred_expire=5
MpiDefault=none
ReturnToService=2
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$D/state
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd-%n.pid
SlurmdSpoolDir=$D/spool/%n
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
JobRequeue=1
# One dead task ends the whole step.
KillOnBadExit=1
KillWait=3
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=30
PropagateResourceLimits=NONE
# The processors below are believed, whatever the machine has.
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$cpus RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$cpus RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
    # submitit asks sacct about jobs that left no result, and waits for ever where there is no accounting.
    cat > "$D/bin/sacct" <<'SACCT'
#!/usr/bin/env python3
# sacct -o JobID,State,NodeList --parsable2 -j ID [-j ID ...], answered by scontrol
import re, subprocess, sys
print("JobID|State|NodeList")
for job in (sys.argv[i + 1] for i, a in enumerate(sys.argv[:-1]) if a == "-j"):
    shown = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True).stdout
    for line in shown.splitlines():
        found = dict(re.findall(r"(\w+)=(\S*)", line))
        if "JobId" in found:
            array = f"{found['ArrayJobId']}_{found['ArrayTaskId']}" if "ArrayTaskId" in found else found["JobId"]
            print(f"{array}|{found['JobState']}|{found.get('NodeList', '')}")
SACCT
    chmod 755 "$D/bin/sacct"
}

start() {
    configure
    export SLURM_CONF="$D/slurm.conf"
    munged --key-file="$D/munge.key" --socket="$D/run/munge.socket" --pid-file="$D/run/munged.pid" \
        --log-file="$D/log/munged.log" --seed-file="$D/run/munged.seed" --force 2> "$D/log/munged.err"
    slurmctld -c
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 60); do
        [ "$(sinfo -h -N -t idle -o %N 2> /dev/null | sort -u | wc -l)" = 2 ] && return
        sleep 0.5
    done
    echo "the nodes did not come up; see $D/log" >&2
    sinfo -N -l >&2
    exit 1
}

stop() {
    export SLURM_CONF="$D/slurm.conf"
    timeout 10 scancel --user="$(id -un)" 2> /dev/null || true
    timeout 10 scancel --signal=KILL --full --user="$(id -un)" 2> /dev/null || true
    local name pid
    for name in slurmd-n2 slurmd-n1 slurmctld munged; do
        pid="$(cat "$D/run/$name.pid" 2> /dev/null)" || continue
        kill "$pid" 2> /dev/null || continue
        for _ in $(seq 50); do
            kill -0 "$pid" 2> /dev/null || break
            sleep 0.2
        done
        kill -KILL "$pid" 2> /dev/null || true
    done
}

verb="${1:-}"
D="${2:-}"
case "$verb" in
    install) install ;;
    start | stop)
        [ -n "$D" ] || { sed -n 2,10p "$0"; exit 2; }
        mkdir -p "$D"
        D="$(cd "$D" && pwd)"
        "$verb"
        ;;
    *) sed -n 2,10p "$0"; exit 2 ;;
esac
