"""A real Slurm on one machine: slurmctld, munged and several slurmd, all on loopback, for as long as a block runs.

    python tests/cluster/slurm_cluster.py install          Debian, Ubuntu; root
    python tests/cluster/slurm_cluster.py run -- bash      a shell in which sbatch, squeue and the like work

Needs root, because slurmd starts processes for users. Every instance has a directory, keys and ports of its own, so
that several run beside each other; the daemons die with the process that started them.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "munged")
CPUS_PER_NODE = 4  # as configured; the machine may have fewer

CONFIG = """\
ClusterName=powertrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# Slurm starts a requeued job when the credential of the attempt before has expired; below 5 s it takes 120.
AuthInfo=socket={home}/munge.sock,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.%n.log
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
# Containers lack the cgroups that the defaults of these use.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Nodes are what this file says, whatever the machine.
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1,bf_resolution=1
# A node that was set down stays down, until somebody resumes it.
ReturnToService=1
JobRequeue=1
MinJobAge=3600
KillWait=10
# Of srun, from the first process that ends on: shorter than some of what a process may do alone.
WaitTime=3
PropagateResourceLimits=NONE
SlurmdTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Return why no cluster can be started here; None where it can."""
    if os.geteuid() != 0:
        return "starting slurmd needs root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (python tests/cluster/slurm_cluster.py install)"
    return None


def install() -> None:
    """Install Slurm from the distribution; its services stay without a configuration, and so off."""
    if why_not() is None:
        return
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
    subprocess.run(
        ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *PACKAGES], check=True, env=environment
    )


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, below the range from which the kernel takes those of connections."""
    found: list[int] = []
    while len(found) < count:
        port = 20000 + secrets.randbelow(10000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class SlurmCluster:
    """A cluster of `nodes` machines called node1, node2, ...; `environment` has what Slurm's commands need."""

    def __init__(self, home: Path, nodes: int = 4) -> None:
        self.home = home
        self.nodes = nodes
        self.environment = {**os.environ, "SLURM_CONF": str(home / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        self._configure()
        try:
            # munged detaches itself from files and terminal, so that it is one daemon like the others here.
            key = ("--key-file", self.home / "munge.key", "--socket", self.home / "munge.sock")
            files = ("--pid-file", self.home / "munged.pid", "--log-file", self.home / "munged.log")
            self._start("munged", "--foreground", "--force", *key, *files, "--seed-file", self.home / "munge.seed")
            self._wait_for(lambda: (self.home / "munge.sock").exists(), "munged")
            self._start("slurmctld", "-D", "-i")
            for index in range(self.nodes):
                self._start("slurmd", "-D", "-N", f"node{index + 1}")
            self._wait_for(lambda: self._idle_nodes() == self.nodes, "slurmctld and slurmd")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Daemons leave the processes of jobs alone when they end.
        for job in self.command("squeue", "--noheader", "--format=%A").split():
            subprocess.run(["scancel", "--signal=KILL", "--full", job], env=self.environment, check=False)
            subprocess.run(["scancel", job], env=self.environment, check=False)
        deadline = time.monotonic() + 20
        while self.command("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.2)
        self._stop()

    def command(self, *arguments: str) -> str:
        """Run one of Slurm's commands and return what it prints."""
        done = subprocess.run(arguments, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout.strip()

    def _configure(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        # munge refuses a socket that others cannot reach.
        self.home.chmod(0o755)
        (self.home / "state").mkdir()
        ports = _free_ports(self.nodes + 1)
        host = socket.gethostname().partition(".")[0]
        nodes = []
        cpus = f"CPUs={CPUS_PER_NODE} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS_PER_NODE} ThreadsPerCore=1"
        for index, port in enumerate(ports[1:], start=1):
            (self.home / "spool" / f"node{index}").mkdir(parents=True)
            nodes.append(
                f"NodeName=node{index} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {cpus} "
                f"RealMemory=8000 State=UNKNOWN"
            )
        (self.home / "slurm.conf").write_text(
            CONFIG.format(home=self.home, host=host, ports=ports, nodes="\n".join(nodes))
        )
        key = self.home / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

    def _start(self, *arguments: str | Path) -> None:
        with (self.home / "daemons.out").open("ab") as output:
            self._daemons.append(
                subprocess.Popen(
                    [str(argument) for argument in arguments],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
            )

    def _idle_nodes(self) -> int:
        done = subprocess.run(
            ["sinfo", "--noheader", "--partition=main", "--states=idle", "--format=%D"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return int(done.stdout.strip() or 0) if done.returncode == 0 else 0

    def _wait_for(self, ready, what: str) -> None:
        deadline = time.monotonic() + 30
        while not ready():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                logs = "\n".join(p.read_text(errors="replace")[-2000:] for p in sorted(self.home.glob("*.log")))
                raise RuntimeError(f"{what} did not start:\n{(self.home / 'daemons.out').read_text()}\n{logs}")
            time.sleep(0.1)

    def _stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []


def main(argv: list[str]) -> int:
    if argv == ["install"]:
        try:
            install()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"Slurm was not installed: {error}", file=sys.stderr)
            return 1
        return 0
    if argv[:2] == ["run", "--"] and argv[2:]:
        reason = why_not()
        if reason:
            print(reason, file=sys.stderr)
            return 1
        with tempfile.TemporaryDirectory() as home, SlurmCluster(Path(home)) as cluster:
            return subprocess.run(argv[2:], env=cluster.environment, check=False).returncode
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
