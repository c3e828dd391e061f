"""A SLURM of two nodes on this machine, where its daemons are installed and may be started: root, Linux, loopback only.

Each daemon runs in a mount and host-name namespace of its own, so that `n1` and `n2` are names of nodes in jobs. What
takes minutes at a site (scheduling, the wait before a requeued job starts) is set to seconds.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dsdistill.training.dist import free_port
from tests.workers import ROOT

NODES = ("n1", "n2")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")
PATHS = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def why_not() -> str | None:
    """What this machine lacks, or None."""
    missing = [name for name in DAEMONS if shutil.which(name, path=PATHS) is None]
    if missing:
        return f"no SLURM: {', '.join(missing)} not found (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "no SLURM: its daemons must be started by root"
    tried = subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True, text=True, check=False)
    return f"no SLURM: no namespaces here ({tried.stderr.strip()})" if tried.returncode else None


class Cluster:
    """Ends with its jobs at `close`, also if `start` failed."""

    def __init__(self, directory: Path):
        self.directory = directory
        for name in ("spool", "ctld"):
            (directory / name).mkdir()
        (directory / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", "ctl", *NODES)))
        (directory / "munge.key").write_bytes(secrets.token_bytes(128))
        (directory / "munge.key").chmod(0o600)
        self.conf = directory / "slurm.conf"
        self.conf.write_text(self._conf())
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "PATH": PATHS,
            "SLURM_CONF": str(self.conf),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        self.daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        directory = self.directory
        munge = ["munged", "--foreground", f"--key-file={directory}/munge.key", f"--socket={directory}/munge"]
        munge += [f"--pid-file={directory}/munged.pid", f"--log-file={directory}/munged.log"]
        self.daemons.append(self._start("ctl", [*munge, f"--seed-file={directory}/seed", "--force"]))
        self.wait_until(lambda: (directory / "munge").exists(), "munged")
        self.daemons.append(self._start("ctl", ["slurmctld", "-D", "-f", str(self.conf)]))
        self.daemons += [self._start(node, ["slurmd", "-D", "-N", node, "-f", str(self.conf)]) for node in NODES]
        self.wait_until(lambda: self.run("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * 2, "idle nodes")

    def _conf(self) -> str:
        here = self.directory
        lines = [
            "ClusterName=test",
            "SlurmctldHost=ctl(127.0.0.1)",
            f"SlurmctldPort={free_port()}",
            "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",
            "AuthType=auth/munge",
            f"AuthInfo=socket={here}/munge,cred_expire=5",  # a requeued job waits for that long
            "SlurmUser=root",
            "SlurmdUser=root",
            f"StateSaveLocation={here}/ctld",
            f"SlurmdSpoolDir={here}/spool/%n",
            f"SlurmctldPidFile={here}/slurmctld.pid",
            f"SlurmdPidFile={here}/slurmd-%n.pid",
            f"SlurmctldLogFile={here}/slurmctld.log",
            f"SlurmdLogFile={here}/slurmd-%n.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "MailProg=/bin/true",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SchedulerParameters=batch_sched_delay=1,sched_interval=1,bf_interval=1",
            "KillWait=30",
            "MinJobAge=86400",
            "ReturnToService=2",
            "SlurmdParameters=config_overrides",
            *(f"NodeName={n} NodeAddr=127.0.0.1 Port={free_port()} CPUs=64 RealMemory=1048576" for n in NODES),
            "PartitionName=test Nodes=ALL Default=YES State=UP",
        ]
        return "\n".join(lines) + "\n"

    def _on(self, host: str, command: Sequence[str]) -> list[str]:
        """The command as it runs on a machine of that name, which knows the others' names."""
        inside = 'mount --bind "$1" /etc/hosts && hostname "$2" && exec "${@:3}"'
        return ["unshare", "--mount", "--uts", "bash", "-c", inside, "-", f"{self.directory}/hosts", host, *command]

    def _start(self, host: str, command: list[str]) -> subprocess.Popen:
        with (self.directory / "start.log").open("a") as log:
            return subprocess.Popen(
                self._on(host, command),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, *command: str, **variables: str) -> str:
        """What a SLURM command says."""
        done = subprocess.run(
            self._on("ctl", command),
            cwd=ROOT,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout if done.returncode == 0 else f"{done.stdout}{done.stderr}"

    def submit(self, *arguments: str, **variables: str) -> str:
        """The number of a new job."""
        told = self.run("sbatch", "--parsable", *arguments, **variables)
        assert told.strip().isdigit(), told
        return told.strip()

    def field(self, job: str, name: str) -> str:
        """A field of a job, such as JobState."""
        told = dict(part.split("=", 1) for part in self.run("scontrol", "show", "job", job).split() if "=" in part)
        return told.get(name, "")

    def wait_until(self, happened: Callable[[], bool], what: str, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < deadline, f"no {what} within {timeout} s: {self._logs()}"
            time.sleep(0.1)

    def _logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-1500:]}" for p in self.directory.glob("*.log"))

    def close(self) -> None:
        self.run("scancel", "--signal=KILL", "--full", "--state=RUNNING")
        self.run("scancel", "--state=PENDING")
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
