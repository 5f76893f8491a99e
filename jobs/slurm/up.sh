#!/usr/bin/env bash
# A Slurm cluster of one machine, with accounting, without systemd: jobs/slurm/up.sh [FOLDER] [NODES]
# Needs root and Debian's packages slurm-wlm munge slurmdbd mariadb-server. Slurm listens where the machine's name leads
# to: with Debian's /etc/hosts that is the loopback. Then: export SLURM_CONF=FOLDER/slurm.conf
set -euo pipefail

folder=$(realpath -m "${1:-/tmp/dare-slurm}") nodes=${2:-2}
host=$(hostname -s) cores=${CORES_PER_NODE:-$(nproc)} memory=${MIB_PER_NODE:-8192}

# Slurm listens on the address of the name (NoInAddrAny), or else on all.
address=$(getent ahostsv4 "$host" | awk 'NR == 1 { print $1 }')

fail() { echo "slurm: $*" >&2; exit 1; }
[[ $nodes =~ ^[1-9][0-9]?$ ]] || fail "$nodes nodes: 1 to 99 are possible"
[ "$(id -u)" = 0 ] || fail "its daemons change users, so root has to start them"
[ -n "$address" ] || fail "the machine's name, $host, has no address; add '127.0.0.1 $host' to /etc/hosts"
[[ $address = 127.* ]] || echo "slurm: reachable from the network, at $address; only munge's key lets anyone in" >&2
missing=()
for command in munged mariadbd mariadb-install-db slurmdbd slurmctld slurmd sacct; do
  command -v "$command" >/dev/null || missing+=("$command")
done
[ ${#missing[@]} = 0 ] || fail "no ${missing[*]}; apt-get install slurm-wlm munge slurmdbd mariadb-server"
for running in "$folder"/run/*.pid; do
  [ ! -f "$running" ] || ! kill -0 "$(cat "$running")" 2>/dev/null || fail "runs already in $folder; see down.sh"
done
[ ! -e "$folder" ] || [ -f "$folder/slurm.conf" ] || [ -z "$(ls -A "$folder")" ] || fail "$folder holds something else"

mkdir -p "$folder"/{run,log,state,spool}
chmod 755 "$folder" "$folder/run"
rm -f "$folder"/run/*

# Waits for up to 30 s.
until_ok() {
  for _ in $(seq 300); do
    if timeout 5 "$@" >/dev/null 2>&1; then return; fi
    sleep 0.1
  done
  fail "waited 30 s for: $*; see $folder/log"
}

# Every part listens on a port of its own that was free a moment ago.
read -r database_port accounting_port control_port first_port < <(python3 - "$nodes" <<'PYTHON'
import socket, sys

def free(port):
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True

count = 3 + int(sys.argv[1])
print(*next([b, b + 1, b + 2, b + 3] for b in range(16817, 30000, 100) if all(map(free, range(b, b + count)))))
PYTHON
)

# The database of the accounting, in a process that trusts this machine's root and the accounting's password.
[ -f "$folder/password" ] || (umask 077; head -c 18 /dev/urandom | base64 >"$folder/password")
password=$(cat "$folder/password")
if [ ! -d "$folder/mysql" ]; then
  mariadb-install-db --no-defaults --user=root --datadir="$folder/mysql" --auth-root-authentication-method=socket \
    --auth-root-socket-user=root --skip-test-db >"$folder/log/mysql-install.log" 2>&1
fi
setsid mariadbd --no-defaults --user=root --datadir="$folder/mysql" --socket="$folder/run/mysql.sock" \
  --port="$database_port" --bind-address=127.0.0.1 --pid-file="$folder/run/mysql.pid" --innodb-buffer-pool-size=128M \
  --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 >"$folder/log/mysql.log" 2>&1 </dev/null &
sql() { mariadb --no-defaults --user=root --socket="$folder/run/mysql.sock" --execute "$1"; }
until_ok mariadb --no-defaults --user=root --socket="$folder/run/mysql.sock" --execute "select 1"
sql "create database if not exists slurm_accounting;
     create or replace user slurm@'127.0.0.1' identified by '$password';
     create or replace user slurm@localhost identified by '$password';
     grant all on slurm_accounting.* to slurm@'127.0.0.1', slurm@localhost"

[ -f "$folder/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$folder/munge.key")
munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.sock" --pid-file="$folder/run/munged.pid" \
  --log-file="$folder/log/munged.log" --seed-file="$folder/run/munge.seed"

rm -f "$folder/slurmdbd.conf"
(umask 077; cat >"$folder/slurmdbd.conf") <<CONF
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.sock
DbdHost=$host
DbdAddr=$address
DbdPort=$accounting_port
SlurmUser=root
CommunicationParameters=NoInAddrAny
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$database_port
StorageUser=slurm
StoragePass=$password
StorageLoc=slurm_accounting
LogFile=$folder/log/slurmdbd.log
PidFile=$folder/run/slurmdbd.pid
CONF

cat >"$folder/slurm.conf" <<CONF
ClusterName=onehost
SlurmctldHost=$host($address)
SlurmctldPort=$control_port
SlurmUser=root
AuthType=auth/munge
# A job that is requeued waits so long, and two seconds more: until no node takes its former credential any more.
AuthInfo=socket=$folder/run/munge.sock,cred_expire=${REQUEUE_AFTER:-10}
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,bf_resolution=1
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
MinJobAge=300
# Time to save a checkpoint.
KillWait=30
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$address
AccountingStoragePort=$accounting_port
AccountingStoragePass=$folder/run/munge.sock
$(for number in $(seq "$nodes"); do
  echo "NodeName=127.0.0.$((number + 1)) NodeHostname=$host NodeAddr=$address Port=$((first_port + number - 1))" \
    "CPUs=$cores RealMemory=$memory State=UNKNOWN"
done)
PartitionName=dev Nodes=127.0.0.[2-$((nodes + 1))] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF

export SLURM_CONF=$folder/slurm.conf
slurmdbd
until_ok bash -c "echo >/dev/tcp/$address/$accounting_port"
slurmctld
for number in $(seq "$nodes"); do
  mkdir -p "$folder/spool/127.0.0.$((number + 1))"
  slurmd -N "127.0.0.$((number + 1))"
done
until_ok bash -c "[ \$(sinfo -h -N -t idle -o %N | wc -l) = $nodes ]"
until_ok sacct
sinfo -N -l
echo "export SLURM_CONF=$SLURM_CONF"
