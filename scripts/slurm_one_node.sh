#!/usr/bin/env bash
# A real SLURM with accounting on this one machine, Debian or Ubuntu, to run and test jobs on:
#
#     scripts/slurm_one_node.sh [start|stop|status]
#
# start installs what is missing, starts munge, MariaDB, slurmdbd, slurmctld and slurmd, and returns
# once a job has run and sacct knows it. Everything listens on 127.0.0.1 or a socket, nothing needs
# systemd. stop cancels the jobs and ends what start started, no other daemon; the accounts stay.
# Exit status: 0 fine, 1 something failed or isn't running, 2 used wrongly or not by root.
set -euo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C

MARK="# written by slurm_one_node.sh"   # a configuration without this line is somebody's own
CONF=/etc/slurm/slurm.conf
DBD_CONF=/etc/slurm/slurmdbd.conf
CGROUP_CONF=/etc/slurm/cgroup.conf
STATE=/var/lib/slurm
LOG=/var/log/slurm
RUN=/run/slurm-one-node                 # holds the pid files of what start started
DB_SOCKET=$RUN/mariadb.sock
DAEMONS=(munged mariadbd slurmdbd slurmctld slurmd)
PATIENCE=60                             # seconds for a daemon to answer, or for the first job

say() { echo "slurm_one_node: $*"; }
die() { say "$*" >&2; exit 1; }
usage() { say "$*" >&2; exit 2; }

# With no variable of the caller's: SBATCH_… or SLURM_… would change what runs.
CLEAN=(env -i PATH="$PATH" LC_ALL=C HOME=/)
clean() { "${CLEAN[@]}" "$@"; }

log_of() {
    case $1 in
        munged) echo /var/log/munge/munged.log ;;
        *) echo "$LOG/$1.log" ;;
    esac
}

daemon_failed() {  # name, what it didn't do
    say "$1 $2; its log ($(log_of "$1")) ends:" >&2
    tail -qn 15 "$RUN/$1.out" "$(log_of "$1")" >&2 2>/dev/null || true
    exit 1
}

# A daemon's pid, if start started it and it still runs: neither dead and not yet collected, nor
# another program that came by the same pid.
pid_of() {
    local pid program state _
    { read -r pid <"$RUN/$1.pid" && read -r _ program state _ <"/proc/$pid/stat"; } 2>/dev/null || return
    [[ $program == "($1)" && $state != Z ]] && echo "$pid"
}

wait_for() {  # name of a daemon, then the command that succeeds once it answers
    local name=$1 began=$SECONDS
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < began + PATIENCE)) || daemon_failed "$name" "does not answer after $PATIENCE s"
        # A few seconds to write its pid, but no minute's wait for one that is gone.
        ((SECONDS < began + 5)) || pid_of "$name" >/dev/null || daemon_failed "$name" "has ended"
        sleep 0.2
    done
}

# --- what must hold before anything is touched -----------------------------------------------------

refuse_foreign() {
    local file
    for file in "$CONF" "$DBD_CONF" "$CGROUP_CONF" /etc/slurm-llnl/slurm.conf; do
        if [[ -e $file ]] && ! grep -qxF "$MARK" "$file"; then
            die "$file is not this script's; leaving the SLURM configured there alone"
        fi
    done
    if [[ -n ${SLURM_CONF-} && $SLURM_CONF != "$CONF" ]]; then
        die "SLURM_CONF points to $SLURM_CONF; leaving the SLURM configured there alone"
    fi
}

# SLURM binds its daemons and srun to the address that the machine's name stands for. Not any
# 127.… will do: a connection to 127.0.1.1 comes from 127.0.0.1, where nobody then answers.
need_loopback_name() {
    local name address
    name=$(uname -n)
    address=$(getent ahostsv4 "$name" | awk '{print $1; exit}') || true
    [[ $address == 127.0.0.1 ]] \
        || die "this machine's name stands for ${address:-no address}, so SLURM would listen there and" \
            "not on 127.0.0.1: append '127.0.0.1 $name' to /etc/hosts"
}

install_missing() {
    local command missing=no out=/var/log/slurm_one_node.apt.log
    for command in munged mariadbd mariadb mariadb-install-db slurmdbd slurmctld slurmd sbatch sacct; do
        command -v "$command" >/dev/null || missing=yes
    done
    [[ $missing == yes ]] || return 0
    say "installing SLURM, munge and MariaDB (log: $out)"
    # MariaDB's core alone: the server program, but no service of its own and no database in
    # /var/lib/mysql. --no-remove: another MySQL's packages would otherwise have to go.
    if ! { apt-get -q update \
            && DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=300 \
                install --no-install-recommends --no-remove \
                slurm-wlm slurmdbd munge mariadb-server-core mariadb-client-core; } >"$out" 2>&1 </dev/null; then
        tail -n 15 "$out" >&2
        die "apt-get could not install the packages; its log ends as above"
    fi
    # Where systemd runs, the packages' services would start at boot with this configuration.
    if [[ -d /run/systemd/system ]]; then
        systemctl --quiet disable --now slurmd slurmctld slurmdbd || true
    fi
}

# --- configuration -----------------------------------------------------------------------------------

slurm_conf() {
    local cpus memory task=task/affinity
    cpus=$(clean nproc)   # which heeds OMP_NUM_THREADS
    # A twentieth is left to the system and the daemons, as jobs get what they ask for.
    memory=$(awk '/^MemTotal:/ {print int($2 / 1024 * 0.95)}' /proc/meminfo)
    # In a container held to some of the CPUs, SLURM's numbering of them would not be the kernel's.
    [[ $cpus == "$(clean nproc --all)" ]] || task=task/none
    cat <<CONF
$MARK
ClusterName=one-node
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=slurm
AuthType=auth/munge
# A requeued job waits until its old credential is out of date: 15 seconds, not two minutes.
AuthInfo=cred_expire=15
# Listen on the address of this machine's name, 127.0.0.1, not on all that it has.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny

StateSaveLocation=$STATE/slurmctld
SlurmdSpoolDir=$STATE/slurmd
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd.log

# No cgroups, for a container seldom may make them.
ProctrackType=proctrack/linuxproc
TaskPlugin=$task
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=10
MpiDefault=none

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1

# CPUs and memory are shared out one by one, so that several jobs run at once; a job that names no
# memory gets a CPU's share of it, not the whole node's.
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=$((memory / cpus))
# A job that asks for more than there is is refused, not left waiting for ever.
EnforcePartLimits=ALL
# Jobs are few and small here: look for one to start every second, not every half minute.
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1

ReturnToService=2
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
CONF
}

slurmdbd_conf() {
    # No password: over its socket MariaDB knows the system's user slurm.
    cat <<CONF
$MARK
AuthType=auth/munge
DbdHost=localhost
DbdAddr=127.0.0.1
CommunicationParameters=NoInAddrAny
SlurmUser=slurm
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StorageLoc=slurm_acct_db
LogFile=$LOG/slurmdbd.log
PidFile=$RUN/slurmdbd.pid
CONF
}

# slurmd looks for cgroups even if nothing uses them, and for v2 it wants systemd. From 24.05 on one
# may say that there are none; before, the plugin for v1, which does nothing by itself, is as good.
cgroup_conf() {
    local version plugin=cgroup/v1
    version=$(slurmd -V)   # "slurm-wlm 22.05.8"
    version=${version##* }
    if ((${version%%.*} >= 24)); then plugin=disabled; fi
    printf '%s\nCgroupPlugin=%s\n' "$MARK" "$plugin"
}

configure() {
    install -d -o slurm -g slurm -m 755 "$RUN" "$LOG" "$STATE" "$STATE/slurmctld"
    install -d -m 755 /etc/slurm "$STATE/slurmd"
    # Daemons that run keep the configuration that they have read.
    if ! pid_of slurmdbd >/dev/null; then
        slurmdbd_conf | install -o slurm -g slurm -m 600 /dev/stdin "$DBD_CONF"
    fi
    if ! pid_of slurmctld >/dev/null && ! pid_of slurmd >/dev/null; then
        slurm_conf | install -m 644 /dev/stdin "$CONF"
        cgroup_conf | install -m 644 /dev/stdin "$CGROUP_CONF"
    fi
}

# --- daemons -----------------------------------------------------------------------------------------
# Each is left alone if it runs.

launch() {  # name, command: what it says before it has a log is kept; the lock is not for it to hold
    clean "${@:2}" </dev/null >"$RUN/$1.out" 2>&1 9>&- || daemon_failed "$1" "did not start"
}

munge_works() { munge -n | unmunge; }

start_munged() {
    munge_works >/dev/null 2>&1 && return   # ours, or the machine's own, which serves as well
    install -d -o munge -g munge -m 755 /run/munge
    [[ -s /etc/munge/munge.key ]] || runuser -u munge -- mungekey --create --keyfile /etc/munge/munge.key
    launch munged runuser -u munge -- munged --pid-file=/run/munge/munged.pid --log-file="$(log_of munged)"
    cp /run/munge/munged.pid "$RUN/munged.pid"
    wait_for munged munge_works
}

sql() { clean mariadb --no-defaults --socket="$DB_SOCKET" --user=root -e "$1"; }

start_mariadbd() {
    local data=$STATE/mariadb
    if [[ ! -d $data ]]; then
        rm -rf "$data.new"   # of a start that was cut off
        install -d -o slurm -g slurm -m 700 "$data.new"
        launch mariadbd mariadb-install-db --no-defaults --user=slurm --datadir="$data.new" \
            --auth-root-authentication-method=socket --skip-test-db
        mv "$data.new" "$data"
    fi
    if ! pid_of mariadbd >/dev/null; then
        # Not by clean, or $! were the pid of a shell. The lock's time is what slurmdbd wants.
        "${CLEAN[@]}" setsid mariadbd --no-defaults --user=slurm --datadir="$data" --socket="$DB_SOCKET" \
            --pid-file="$data/mariadbd.pid" --skip-networking --innodb-lock-wait-timeout=900 \
            </dev/null >>"$(log_of mariadbd)" 2>&1 9>&- &
        echo $! >"$RUN/mariadbd.pid"
    fi
    wait_for mariadbd sql "SELECT 1"
    sql "CREATE DATABASE IF NOT EXISTS slurm_acct_db;
         CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED VIA unix_socket;
         GRANT ALL ON slurm_acct_db.* TO slurm@localhost" \
        || daemon_failed mariadbd "did not make the accounts' database"
}

start_slurmdbd() {
    pid_of slurmdbd >/dev/null || launch slurmdbd MYSQL_UNIX_PORT="$DB_SOCKET" slurmdbd
    wait_for slurmdbd clean sacctmgr -n show cluster
    # slurmctld wants its cluster to be known when it starts.
    if [[ -z $(clean sacctmgr -nP show cluster one-node) ]]; then
        clean sacctmgr -Qi add cluster one-node >/dev/null || daemon_failed slurmdbd "did not add the cluster"
    fi
}

start_slurmctld() {
    pid_of slurmctld >/dev/null || launch slurmctld slurmctld
    wait_for slurmctld clean scontrol ping
}

node_up() { [[ $(clean sinfo -h -N -o %T) =~ ^(idle|mixed|allocated|completing)$ ]]; }

start_slurmd() {
    pid_of slurmd >/dev/null || launch slurmd slurmd -N localhost
    # A node that was drained, as after a process that could not be killed, takes jobs again.
    clean scontrol update nodename=localhost state=resume >/dev/null 2>&1 || true
    wait_for slurmd node_up
}

# --- the proof: a job with a step, as submitit's have, from sbatch to sacct ---------------------------

run_a_job() {
    local job state="" waits end=$((SECONDS + PATIENCE))
    job=$(cd / && clean sbatch --parsable --job-name=slurm_one_node --output=/dev/null --ntasks=1 --mem=16 \
        --time=1 --wrap="srun true") || daemon_failed slurmctld "took no job"
    while ((SECONDS < end)); do
        state=$(clean sacct -XnP -j "$job" -o State 2>/dev/null || true)
        case $state in
            COMPLETED) return ;;
            FAILED | NODE_FAIL | TIMEOUT | CANCELLED*) break ;;
        esac
        # On a node that is full of others' jobs it waits its turn; that is no fault.
        waits=$(clean squeue -h -j "$job" -o %r 2>/dev/null || true)@$(clean sinfo -h -o %T)
        if [[ $state == PENDING && $waits =~ ^(Resources|Priority)@(mixed|allocated)$ ]]; then
            clean scancel "$job"
            return
        fi
        sleep 0.2
    done
    clean scancel "$job" 2>/dev/null || true
    blame "$job" "$state"
}

blame() {  # job, its state
    local name
    for name in mariadbd slurmdbd slurmctld slurmd; do
        pid_of "$name" >/dev/null || daemon_failed "$name" "has ended"
    done
    case $2 in
        "") daemon_failed slurmdbd "has no account of job $1 after $PATIENCE s" ;;
        PENDING) daemon_failed slurmctld "did not start job $1 within $PATIENCE s" ;;
        *) daemon_failed slurmd "left job $1 $2" ;;
    esac
}

# --- the three commands --------------------------------------------------------------------------------

start() {
    command -v apt-get >/dev/null || die "installs with apt-get, which is not here: Debian or Ubuntu only"
    refuse_foreign
    need_loopback_name
    exec 9>/run/slurm-one-node.lock
    flock -w 900 9 || die "another start or stop has not ended for 15 minutes"
    install_missing
    configure
    start_munged
    start_mariadbd
    start_slurmdbd
    start_slurmctld
    start_slurmd
    run_a_job
    say "ready: $(clean sinfo -h -o '%c CPUs, %m MB')"
}

end_jobs() {
    local end=$((SECONDS + PATIENCE)) jobs
    jobs=$(clean squeue -h -o %A 2>/dev/null | sort -u) || return 0
    [[ -n $jobs ]] || return 0
    # shellcheck disable=SC2086  # one word per job
    clean scancel $jobs || true
    while ((SECONDS < end)) && [[ -n $(clean squeue -h 2>/dev/null) ]]; do sleep 0.2; done
}

stop() {
    local i name pid end
    exec 9>/run/slurm-one-node.lock
    flock -w 900 9 || die "another start or stop has not ended for 15 minutes"
    if pid_of slurmctld >/dev/null && pid_of slurmd >/dev/null; then end_jobs; fi
    for ((i = ${#DAEMONS[@]} - 1; i >= 0; i--)); do
        name=${DAEMONS[i]}
        if pid=$(pid_of "$name"); then
            kill "$pid"
            end=$((SECONDS + PATIENCE))
            while pid_of "$name" >/dev/null; do
                ((SECONDS < end)) || daemon_failed "$name" "has not ended $PATIENCE s after SIGTERM"
                sleep 0.1
            done
        fi
        rm -f "$RUN/$name.pid"
    done
    say "stopped"
}

status() {
    local name pid rc=0
    for name in "${DAEMONS[@]}"; do
        if pid=$(pid_of "$name"); then
            say "$name runs (pid $pid)"
        elif [[ $name == munged ]] && munge_works >/dev/null 2>&1; then
            say "munged runs, not started from here"
        else
            say "$name does not run"
            rc=1
        fi
    done
    if ((rc == 0)); then clean sinfo; fi
    return "$rc"
}

command=${1:-start}
[[ $# -le 1 && $command =~ ^(start|stop|status)$ ]] || usage "usage: ${0##*/} [start|stop|status]"
((EUID == 0)) || usage "needs root"
"$command"
