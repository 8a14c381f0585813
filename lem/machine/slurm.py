"""Asks the Slurm scheduler, through its own commands, about jobs and nodes; also cancels and requeues jobs.

`lem.studies.slurm` submits the jobs. This module knows nothing about experiments. If Slurm does not respond, the
functions that read the queue raise `Unreachable`, and the caller decides how long to keep trying. Other functions that
ask for information return an empty result or a default instead.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The maximum time that a command may take, in seconds.
COMMAND_S = 30.0
# The number of ids that certainly fit on one command line.
IDS_AT_ONCE = 500
# Slurm's default for MaxArraySize.
MAX_ARRAY_SIZE = 1001
# The states of a job that has ended, unless it is requeued.
OVER = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
     "TIMEOUT")
)  # fmt: skip
# Reasons for waiting that remain when other jobs end: a person has to change something.
NEVER_STARTS = re.compile(
    r"PartitionTimeLimit|PartitionNodeLimit|PartitionDown|PartitionInactive|PartitionConfig|BadConstraints|JobHeldAdmin|"
    r"AccountNotAllowed|QOSNotAllowed|InvalidAccount|InvalidQOS|DependencyNeverSatisfied|"
    r"(Assoc|QOS)Max\w*PerJob\w*|(Assoc|QOS)Grp\w*Minutes\w*|launch failed.*"
)
# If a signal ends a program, the shell's exit code is this value plus the signal's number.
BY_SIGNAL = 128


@dataclass(frozen=True)
class Queued:
    """A job in the queue, or one that has just left it; `node` is empty while the job waits."""

    state: str
    reason: str
    restarts: int
    node: str

    @property
    def is_over(self) -> bool:
        """Whether the job has ended."""
        return self.state in OVER

    @property
    def is_waiting(self) -> bool:
        """Whether the job has not started, or waits to start again."""
        return self.state == "PENDING"

    @property
    def cannot_start(self) -> bool:
        """Whether the job waits for something that will not happen unless a person changes something."""
        return self.is_waiting and NEVER_STARTS.fullmatch(self.reason) is not None


class Unreachable(Exception):
    """Slurm does not respond; the message says why."""


def queue(ids: Sequence[str]) -> dict[str, Queued]:
    """Return the given jobs that Slurm's controller still knows about, by id; a task's id has the form `123_4`.

    Arrays are queried as a whole, so that one query is enough for thousands of tasks.

    Raises:
        Unreachable: the controller does not respond.
    """
    found: dict[str, Queued] = {}
    wanted, jobs = set(ids), list(dict.fromkeys(each.partition("_")[0] for each in ids))
    form = "JobArrayID:|,State:|,RestartCnt:|,NodeList:|,Reason:|"
    for start in range(0, len(jobs), IDS_AT_ONCE):
        some = ",".join(jobs[start : start + IDS_AT_ONCE])
        asked = ("--noheader", "--array", "--states=all", f"--jobs={some}", f"--Format={form}")
        code, text, error = _run("squeue", *asked)
        if code and "Invalid job id" not in error:
            raise Unreachable(" ".join(error.split()) or f"squeue ended with exit code {code}")
        for line in text.splitlines():
            fields = line.strip().split("|")
            if len(fields) >= 5:
                name, state, restarts, node, reason = (each.strip() for each in fields[:5])
                if name not in wanted:
                    continue
                found[name] = Queued(state, reason, int(restarts) if restarts.isdecimal() else 0, node)
    return found


def submitted_from(folder: Path) -> list[str]:
    """Return the ids of this user's jobs and arrays whose batch file is in `folder`.

    Jobs that the controller has forgotten are missing.

    Raises:
        Unreachable: the controller does not respond.
    """
    code, text, error = _run("squeue", "--me", "--noheader", "--states=all", "--Format=ArrayJobID:|,Command:|")
    if code:
        raise Unreachable(" ".join(error.split()) or f"squeue ended with exit code {code}")
    lines = [line.strip().rstrip("|").partition("|") for line in text.splitlines()]
    return sorted(
        {job_id.strip() for job_id, _, file in lines if Path(file.strip()).parent == folder.resolve()}, key=int
    )


@dataclass(frozen=True)
class Ended:
    """How a job ended, according to Slurm."""

    state: str
    reason: str = ""
    exit_code: str = ""
    node: str = ""

    @property
    def sentence(self) -> str:
        """The state, the node, the reason and the exit code, in words."""
        where = f" on {self.node}" if self.node else ""
        why = f", {self.reason}" if self.reason and self.reason != "None" else ""
        return f"{self.state}{where}{why}{self._exit}"

    @property
    def _exit(self) -> str:
        code, _, number = self.exit_code.partition(":")
        if number.isdecimal() and int(number):
            return f", ended by signal {number}"
        if not code.isdecimal() or not int(code):
            return ""
        by_signal = f" (ended by signal {int(code) - BY_SIGNAL})" if int(code) > BY_SIGNAL else ""
        return f", exit code {code}{by_signal}"


def ended(job_id: str) -> Ended | None:
    """Return how a job ended, according to the controller or else the accounting; None if neither knows the job."""
    return _remembered(job_id) or _accounted(job_id)


def has_accounting() -> bool:
    """Return whether Slurm's accounting (sacct) responds."""
    code, _, _ = _run("sacct", "--noheader", "--allocations", "--starttime=now")
    return code == 0


def _remembered(job_id: str) -> Ended | None:
    _, text, _ = _run("scontrol", "--oneliner", "show", "job", job_id)
    known = _fields(text)
    if known.get("JobState") not in OVER:
        return None
    return Ended(
        known["JobState"], known.get("Reason", ""), known.get("ExitCode", ""), _node(known.get("NodeList", ""))
    )


def _accounted(job_id: str) -> Ended | None:
    form = "--format=State,Reason,ExitCode,NodeList"
    _, text, _ = _run("sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job_id, form)
    for line in text.splitlines():
        state, reason, code, node = (line.split("|") + [""] * 4)[:4]
        # CANCELLED is followed by the number of the user who canceled the job.
        if state.partition(" ")[0] in OVER:
            return Ended(state, reason, code, _node(node))
    return None


def _node(text: str) -> str:
    return "" if text in ("(null)", "None assigned") else text


def trouble(node: str) -> str | None:
    """Describe what is wrong with a node that cannot run jobs; None if nothing is wrong, or if that is unknown."""
    _, text, _ = _run("scontrol", "--oneliner", "show", "node", node)
    known = _fields(text)
    state = known.get("State", "")
    if not re.search(r"DOWN|FAIL|NOT_RESPONDING", state):
        return None
    found = re.search(r"Reason=(.*?)(?: \[|\s*$)", text)
    return f"node {node} is {state}" + (f" ({found[1].strip()})" if found else "")


def node_failure(job_id: str, node: str) -> str | None:
    """Describe the failure of the node on which a job ran; None if no failure is known.

    Slurm puts a job back into the queue if its node fails.
    """
    if found := trouble(node):
        return found
    form = "--format=State,NodeList"
    _, text, _ = _run("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", "--jobs", job_id, form)
    failed = [line.partition("|")[2] for line in text.splitlines() if line.startswith("NODE_FAIL")]
    return f"node {failed[-1]} failed" if failed else None


# ------------------------------------------------------------------ nodes
@dataclass(frozen=True)
class Node:
    """A node in Slurm's configuration; nodes of the same `kind` have the same GPUs, cores and features."""

    name: str
    kind: str
    gpus: int
    is_usable: bool


def nodes(partition: str | None) -> list[Node]:
    """Return the nodes of a partition, or of several partitions separated by commas; None means the default partition.

    The list is empty if Slurm does not respond, or does not know the partition.
    """
    wanted = set(partition.split(",")) if partition else _default_partitions()
    _, text, _ = _run("scontrol", "--oneliner", "show", "node")
    known = [_fields(line) for line in text.splitlines()]
    return [_as_node(each) for each in known if wanted & set(each.get("Partitions", "").split(","))]


def is_usable(node: str) -> bool:
    """Return whether a node exists and may run jobs."""
    _, text, _ = _run("scontrol", "--oneliner", "show", "node", node)
    return _as_node(_fields(text)).is_usable


def _default_partitions() -> set[str]:
    _, text, _ = _run("scontrol", "--oneliner", "show", "partition")
    known = [_fields(line) for line in text.splitlines()]
    return {each["PartitionName"] for each in known if each.get("Default") == "YES"}


def _as_node(known: Mapping[str, str]) -> Node:
    # The text in parentheses, which says to which sockets a GPU is attached, is removed.
    gpus = re.sub(r"\([^)]*\)", "", known.get("Gres", ""))
    features = ",".join(sorted(known.get("AvailableFeatures", "").replace("(null)", "").split(",")))
    parts = [gpus, features, f"{known.get('CPUTot', '?')} CPUs"]
    return Node(
        name=known.get("NodeName", ""),
        kind=", ".join(filter(None, parts)),
        gpus=sum(map(int, re.findall(r"\bgpu(?::[^:,]+)?:(\d+)", gpus))),
        is_usable=not re.search(r"DOWN|DRAIN|FAIL|NOT_RESPONDING|UNKNOWN", known.get("State", "UNKNOWN")),
    )


def expanded(names: str) -> list[str]:
    """Return all node names in a list in Slurm's short form, such as gpu[1-3,7]."""
    _, text, _ = _run("scontrol", "show", "hostnames", names)
    return text.split()


def shortened(names: Sequence[str]) -> str:
    """Return the short form of node names, such as gpu[1-3,7]; all names in full if Slurm does not respond."""
    code, text, _ = _run("scontrol", "show", "hostlistsorted", ",".join(names))
    return ",".join(names) if code else text.strip()


def _fields(line: str) -> Mapping[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", line))


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are left alone."""
    for start in range(0, len(ids), IDS_AT_ONCE):
        _run("scancel", "--quiet", *ids[start : start + IDS_AT_ONCE])


def own_job_id() -> str | None:
    """Return the id of this process's job, such as `123` or, for a task of an array, `123_4`; None outside Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def max_array_size() -> int:
    """Return the number of tasks that an array may have on this cluster; Slurm's default if it is unknown."""
    _, text, _ = _run("scontrol", "show", "config")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    # The indices of tasks begin with 0, and all of them must be below the cluster's value; a value of 0 forbids arrays.
    return max(1, int(found[1])) if found else MAX_ARRAY_SIZE


def requeue_this_job() -> str | None:
    """Put the job to which this process belongs back into the queue; return why that failed, or None on success."""
    # SLURM_JOB_ID is not used: in one task of an array, it is the id of the whole array.
    code, _, error = _run("scontrol", "requeue", own_job_id() or "")
    return None if not code else " ".join(error.split()) or f"scontrol ended with exit code {code}"


def _run(*command: str) -> tuple[int, str, str]:
    """Run a command and return its exit code, output and error output; 127 means that it hung or could not be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMMAND_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, "", str(error)
    return done.returncode, done.stdout, done.stderr
