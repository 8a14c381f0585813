"""A private Slurm cluster on one machine: the real daemons, two emulated nodes, fake GPUs, accounting if wanted.

    munged ─ slurmctld ─ slurmd (n1), slurmd (n2) [─ mariadbd ─ slurmdbd]

Everything lives in one directory and listens on loopback, without systemd; a Slurm that is installed for real use is
left alone. The GPUs are twins of /dev/null, so that Slurm hands them out although no driver knows them. Starting needs
root and Debian's packages (see `PACKAGES`).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "slurmdbd", "sacctmgr", "mariadbd")
NODES = ("n1", "n2")
GPUS_PER_NODE = 2
START_S = 60.0
STOP_S = 10.0

SLURM_CONF = """\
ClusterName=lemtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/pid/slurmctld
SlurmdPidFile={root}/pid/%n
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
SwitchType=switch/none
TaskPlugin=task/none
ProctrackType=proctrack/linuxproc
# Without cgroups, the accounting plugin polls the memory of jobs and ends those that use too much.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
{accounting}
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
# A node that a test sets down stays down until the test resumes it.
ReturnToService=1
SlurmctldTimeout=30
SlurmdTimeout=30
MessageTimeout=20
InactiveLimit=0
KillWait=5
# A limit has the resolution of a minute; nothing is added to it.
OverTimeLimit=0
MinJobAge={keep_s}
MaxArraySize={max_array_size}
MaxJobCount={max_jobs}
FirstJobId=1
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=DEFAULT Nodes={names} State=UP OverSubscribe=NO PreemptMode=OFF PriorityTier=5 MaxTime=INFINITE
PartitionName=main Default=YES
PartitionName=brief MaxTime=1
# Jobs in `cheap` make way for those in `urgent`.
PartitionName=cheap PreemptMode=REQUEUE GraceTime=30 PriorityTier=1
PartitionName=urgent PriorityTier=10
"""

DBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
PidFile={root}/pid/slurmdbd
LogFile={root}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""


def missing() -> str | None:
    """Return why no cluster can be started here, or None if one can."""
    if os.geteuid() != 0:
        return "the daemons need root"
    absent = [name for name in PROGRAMS if _program(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@dataclass
class Cluster:
    """A cluster in a directory of its own.

    `keep_s` is how long the controller remembers jobs that have ended; the indices of a job array are below
    `max_array_size`; the controller takes `max_jobs` jobs at a time, and `max_submit` of them from a user (which needs
    accounting).
    """

    root: Path
    has_accounting: bool = True
    keep_s: int = 300
    max_array_size: int = 1001
    max_jobs: int = 10_000
    max_submit: int | None = None
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)
    # The place of slurmctld among the daemons.
    _controller: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which Slurm's commands find this cluster."""
        return {"SLURM_CONF": str(self.root / "slurm.conf")}

    def start(self) -> None:
        """Start all daemons, and wait until both nodes are idle."""
        for name in ("state", "pid", "log", "munge", "dev", *(f"spool/{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        os.chmod(self.root, 0o755)
        self._start_munge()
        ports = _free_ports(4)
        accounting = "AccountingStorageType=accounting_storage/none"
        if self.has_accounting:
            accounting = self._start_accounting(ports[3])
        self._write_configuration(ports, accounting)
        self._controller = len(self._daemons)
        self._run("slurmctld", "-D")
        for node in NODES:
            self._run("slurmd", "-D", "-N", node)
        self._wait_for("the nodes", self._nodes_are_idle)
        if self.max_submit:
            self.command("sacctmgr", "-i", "modify", "user", "root", "set", f"MaxSubmitJobs={self.max_submit}")

    def stop(self) -> None:
        """End all jobs and daemons that `start` started, in the reverse order."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self.command("scancel", "--user", "root", "--signal", "KILL", "--full", check=False)
            self.command("scancel", "--user", "root", check=False)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(STOP_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def command(self, *arguments: str, check: bool = True) -> str:
        """Run one of Slurm's commands on this cluster and return what it prints."""
        done = subprocess.run(
            arguments, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def wait_until_idle(self) -> None:
        """Wait until no job is left and both nodes are idle."""
        self._wait_for("an idle cluster", lambda: not self.command("squeue", "-h").strip() and self._nodes_are_idle())

    def forget(self, before: Callable[[], object] = lambda: None) -> None:
        """Restart the controller without its state, so that it knows no job; call `before` while it is down."""
        file, controller = self.root / "slurm.conf", self._daemons[self._controller]
        newest = max(map(int, self.command("squeue", "-h", "-t", "all", "-o", "%A").split()), default=0)
        controller.send_signal(signal.SIGTERM)
        controller.wait(STOP_S)
        before()
        # Ids are not used again, because the accounting still has them.
        file.write_text(re.sub(r"FirstJobId=\d+", f"FirstJobId={newest + 100}", file.read_text()))
        self._run("slurmctld", "-D", "-c")
        self._daemons[self._controller] = self._daemons.pop()
        self._wait_for("the nodes", self._nodes_are_idle)

    # -------------------------------------------------------------- the daemons
    def _start_munge(self) -> None:
        folder = self.root / "munge"
        os.chmod(folder, 0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        os.chmod(key, 0o400)
        paths = {"key-file": key, "socket": folder / "socket", "pid-file": folder / "pid", "seed-file": folder / "seed"}
        paths["log-file"] = folder / "log"
        self._run("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in paths.items()))
        self._wait_for("munge", (folder / "socket").exists)

    def _start_accounting(self, port: int) -> str:
        data, socket_file = self.root / "db", self.root / "db.sock"
        install = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"]
        subprocess.run([*install, "--auth-root-authentication-method=socket"], check=True, capture_output=True)
        self._run(
            "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={socket_file}",
            "--skip-networking", "--skip-log-bin", "--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M",
            "--innodb-flush-log-at-trx-commit=0", f"--pid-file={self.root}/pid/mariadbd",
        )  # fmt: skip
        ping = ["mariadb-admin", "--no-defaults", f"--socket={socket_file}", "ping"]
        self._wait_for("the database", lambda: not subprocess.run(ping, capture_output=True).returncode)
        file = self.root / "slurmdbd.conf"
        file.write_text(DBD_CONF.format(root=self.root, host=_host(), port=port))
        os.chmod(file, 0o600)
        # slurmdbd reads the file beside slurm.conf; the client library finds a server on "localhost" by its socket.
        self._run("slurmdbd", "-D", MYSQL_UNIX_PORT=str(socket_file))
        self._wait_for("slurmdbd", lambda: _answers(port))
        return (
            "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
            f"AccountingStoragePort={port}\nAccountingStoragePass={self.root}/munge/socket"
            + ("\nAccountingStorageEnforce=limits" if self.max_submit else "")
        )

    def _write_configuration(self, ports: Sequence[int], accounting: str) -> None:
        memory_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 * 9 // 10
        nodes, devices = [], []
        for node, port in zip(NODES, ports[1:], strict=False):
            for gpu in range(GPUS_PER_NODE):
                twin = self.root / "dev" / f"{node}gpu{gpu}"
                if not twin.exists():
                    os.mknod(twin, stat.S_IFCHR | 0o666, os.makedev(1, 3))
            devices.append(f"NodeName={node} Name=gpu File={self.root}/dev/{node}gpu[0-{GPUS_PER_NODE - 1}]")
            nodes.append(
                f"NodeName={node} NodeHostname={_host()} NodeAddr=127.0.0.1 Port={port} CPUs={os.cpu_count()} "
                f"RealMemory={memory_mb} Gres=gpu:{GPUS_PER_NODE} State=UNKNOWN"
            )
        (self.root / "gres.conf").write_text("\n".join(devices) + "\n")
        text = SLURM_CONF.format(
            host=_host(), port=ports[0], root=self.root, accounting=accounting, nodes="\n".join(nodes),
            names=",".join(NODES), keep_s=self.keep_s, max_array_size=self.max_array_size, max_jobs=self.max_jobs,
        )  # fmt: skip
        (self.root / "slurm.conf").write_text(text)

    def _run(self, name: str, *arguments: str, **variables: str) -> None:
        program = _program(name)
        assert program is not None
        with (self.root / "log" / f"{name}.out").open("ab") as output:
            daemon = subprocess.Popen(
                [program, *arguments],
                env={**os.environ, **self.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _nodes_are_idle(self) -> bool:
        try:
            states = self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()
        except (RuntimeError, subprocess.TimeoutExpired):
            return False
        return states == ["idle"] * len(NODES)

    def _wait_for(self, what: str, is_there: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + START_S
        while not is_there():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"Waiting for {what} took too long; logs: {self._log_ends()}")
            time.sleep(0.1)

    def _log_ends(self) -> str:
        files = sorted((self.root / "log").iterdir())
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-600:]}" for file in files)


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
