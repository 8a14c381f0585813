"""The Slurm scheduler, through its own commands: which jobs wait or run, why one ended, cancelling, requeuing.

Jobs are submitted by `lem.studies.slurm`. This module knows jobs, not experiments. It does not raise if Slurm does not
answer; the caller decides how long that may last.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Longest time that a command may take, in seconds.
COMMAND_S = 30.0
# As many ids as certainly fit on a command line.
IDS_AT_ONCE = 500
# Slurm's default for MaxArraySize.
MAX_ARRAY_SIZE = 1001
# The states of a job that is over, unless it is requeued.
OVER = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
     "TIMEOUT")
)  # fmt: skip
# Reasons for waiting that do not pass while other jobs end: something has to be changed by a person.
NEVER_STARTS = re.compile(
    r"PartitionTimeLimit|PartitionNodeLimit|PartitionDown|PartitionInactive|PartitionConfig|BadConstraints|JobHeldAdmin|"
    r"AccountNotAllowed|QOSNotAllowed|InvalidAccount|InvalidQOS|DependencyNeverSatisfied|"
    r"(Assoc|QOS)Max\w*PerJob\w*|(Assoc|QOS)Grp\w*Minutes\w*|launch failed.*"
)
# The exit code of a shell for a program that a signal ended is the signal's number plus this.
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
        """Whether the job waits for something that does not happen by itself."""
        return self.is_waiting and NEVER_STARTS.fullmatch(self.reason) is not None


class Unreachable(Exception):
    """Slurm's commands do not answer; the text says why."""


def queue(ids: Sequence[str]) -> dict[str, Queued]:
    """Return those of the jobs that Slurm's controller still knows, by id; the id of an array's task is `123_4`.

    Arrays are asked for as a whole, so that one question is enough for thousands of tasks.

    Raises:
        Unreachable: the controller does not answer.
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
    """Return the ids of this user's jobs and arrays whose batch file is in a directory, as far as they are known.

    Raises:
        Unreachable: the controller does not answer.
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
    """How Slurm says that a job ended."""

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
    """Return how a job ended: as the controller remembers it, else from the accounting; None if neither knows it."""
    return _remembered(job_id) or _accounted(job_id)


def has_accounting() -> bool:
    """Return whether sacct answers."""
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
        # CANCELLED is followed by the number of the user who cancelled the job.
        if state.partition(" ")[0] in OVER:
            return Ended(state, reason, code, _node(node))
    return None


def _node(text: str) -> str:
    return "" if text in ("(null)", "None assigned") else text


def trouble(node: str) -> str | None:
    """Return in words what is wrong with a node that cannot run jobs; None if nothing is, or if it is unknown."""
    _, text, _ = _run("scontrol", "--oneliner", "show", "node", node)
    known = _fields(text)
    state = known.get("State", "")
    if not re.search(r"DOWN|FAIL|NOT_RESPONDING", state):
        return None
    found = re.search(r"Reason=(.*?)(?: \[|\s*$)", text)
    return f"node {node} is {state}" + (f" ({found[1].strip()})" if found else "")


def node_failure(job_id: str, node: str) -> str | None:
    """Return in words that a job was put back into the queue because its node failed; None if that is not known."""
    if found := trouble(node):
        return found
    form = "--format=State,NodeList"
    _, text, _ = _run("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", "--jobs", job_id, form)
    failed = [line.partition("|")[2] for line in text.splitlines() if line.startswith("NODE_FAIL")]
    return f"node {failed[-1]} failed" if failed else None


# ------------------------------------------------------------------ nodes
@dataclass(frozen=True)
class Node:
    """A node of the cluster as Slurm is configured; nodes of the same `kind` have the same GPUs, cores and features."""

    name: str
    kind: str
    gpus: int
    is_usable: bool


def nodes(partition: str | None) -> list[Node]:
    """Return the nodes of a partition (of several, separated by commas); None stands for the default partition.

    The list is empty if Slurm does not answer, or does not know the partition.
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
    # The sockets in parentheses tell where a GPU is plugged in.
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
    """Return the names in Slurm's short form, such as gpu[1-3,7], one by one."""
    _, text, _ = _run("scontrol", "show", "hostnames", names)
    return text.split()


def shortened(names: Sequence[str]) -> str:
    """Return names of nodes in Slurm's short form."""
    code, text, _ = _run("scontrol", "show", "hostlistsorted", ",".join(names))
    return ",".join(names) if code else text.strip()


def _fields(line: str) -> Mapping[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", line))


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended are left alone."""
    for start in range(0, len(ids), IDS_AT_ONCE):
        _run("scancel", "--quiet", *ids[start : start + IDS_AT_ONCE])


def own_job_id() -> str | None:
    """Return the id of the job that this process belongs to, `123_4` for a task of an array; None outside of Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def max_array_size() -> int:
    """Return the number of tasks that an array may have on this cluster; Slurm's default if it does not say."""
    _, text, _ = _run("scontrol", "show", "config")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    # The indices of tasks begin with 0, and all of them must be below the cluster's value; 0 allows no arrays.
    return max(1, int(found[1])) if found else MAX_ARRAY_SIZE


def requeue_this_job() -> str | None:
    """Put the job that this process belongs to back into the queue; return why that failed, or None."""
    # Not SLURM_JOB_ID: in one task of an array, that is the id of the whole array.
    code, _, error = _run("scontrol", "requeue", own_job_id() or "")
    return None if not code else " ".join(error.split()) or f"scontrol ended with exit code {code}"


def _run(*command: str) -> tuple[int, str, str]:
    """Run a command; return its exit code, its output and its errors. A command that cannot run has the code 127."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMMAND_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, "", str(error)
    return done.returncode, done.stdout, done.stderr
