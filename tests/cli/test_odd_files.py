"""A folder of odd files from someone else: nothing in it runs, nothing changes the terminal, each refusal is one line.

The tests create the folder. Whatever the command line names, a canary file shows whether any of its code has run.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shlex
import signal
import sys
import tarfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from lem.quantities import printable
from tests.conftest import command

CANARY = "canary"
ESC, BEL, CSI = "\x1b", "\x07", "\x9b"
# Each would colour a terminal, set its title, ring, clear it, move its cursor, reverse text, or fake a line.
PAINTS = (
    f"{ESC}[31mred", f"{ESC}]0;title{BEL}", f"{ESC}]8;;http://evil.example{ESC}\\link", f"{CSI}41mback",
    BEL, "\x08\x08",
    f"{ESC}[2J{ESC}[H",
    "\u202egnp.exe", "a\rError: none", "a\nError: forged", "\x7f", "[red]rich[/red]", "[link=x]y[/]",
    ":bomb:", "\u2028next", "\x9d0;title\x9c", "a\tb", "%s%n", "$(touch canary)", "`touch canary`", "; touch canary",
)  # fmt: skip
SLOW_S = 60
BATCH_S = 600


@pytest.fixture(scope="module")
def sings(tmp_path_factory) -> tuple[Path, str]:
    """Return the canary, and Python code that creates it."""
    canary = tmp_path_factory.mktemp("cage") / CANARY
    return canary, f"open({str(canary)!r}, 'w').close()"


@pytest.fixture(scope="module")
def odd(tmp_path_factory, sings) -> Path:
    """Create the folder."""
    canary, code = sings
    folder = tmp_path_factory.mktemp("odd")
    start = shlex.join([sys.executable, "-c", f"{code}  # {{port}}"])
    texts = _configs(start, code) | _names()
    for name, text in texts.items():
        with_name = folder / name
        with_name.write_bytes(text if isinstance(text, bytes) else text.encode())
    for module in ("sitecustomize", "usercustomize", "transformers", "torch", "yaml", "numpy", "lem_plugin", "setup"):
        (folder / f"{module}.py").write_text(code)
    (folder / ".env").write_text(f"PYTHONPATH={folder}\nPYTHONSTARTUP={folder}/setup.py\nBASH_ENV={folder}/x.sh\n")
    (folder / "x.sh").write_text(f"touch {canary}")
    (folder / "x.sh").chmod(0o755)
    _odd_kinds(folder)
    _options(folder / "conf", start)
    _checkout(folder / ".git", canary)
    assert len([path for path in folder.rglob("*") if not path.is_dir()]) >= 100
    return folder


def _configs(start: str, code: str) -> dict[str, str | bytes]:
    head = "model: tiny\ndataset: {path: 'builtin:sample', sample_size: 1}\nenergy: none\n"
    quoted = json.dumps(start)
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    texts: dict[str, str | bytes] = {
        "command": f"{head}backend: {{name: openai, command: {quoted}}}",
        "command-url": f"{head}backend: {{name: openai, url: 'http://127.0.0.1:1', command: {quoted}}}",
        "command-anchor": f"x: &x {{name: openai, command: {quoted}}}\n{head}backend: *x",
        "command-interpolated": f"{head}revision: {quoted}\nbackend: {{name: openai, command: '${{revision}}'}}",
        "command-inherited": "defaults: [command]",
        "code": f"{head}trust_remote_code: true\nbackend: {{name: pytorch, device: cpu}}",
        "code-vllm": f"{head}trust_remote_code: true\nbackend: {{name: vllm, engine_args: {{worker_cls: setup.X}}}}",
        "code-vllm-without": f"{head}backend: {{name: vllm, engine_args: {{worker_cls: setup.X}}}}",
        "tag-python": f'model: !!python/object/apply:eval ["{code}"]',
        "tag-module": "model: !!python/module:setup",
        "tag-name": "model: !!python/name:setup.x",
        "tag-new": "model: !!python/object/new:os.system [touch canary]",
        "tag-binary": "model: !!binary aGVsbG8=",
        "target": f"{head}_target_: os.system\n_args_: ['touch canary']",
        "target-model": "model: {_target_: os.system, command: touch canary}",
        "hydra": "hydra: {launcher: {_target_: os.system}}",
        "hydra-search": "hydra: {searchpath: ['file:///tmp']}",
        "hydra-defaults": "defaults: [{override hydra/launcher: basic}]",
        "resolver": "model: ${eval:1+1}",
        "resolver-env": "model: ${oc.env:NOT_THERE}",
        "resolver-decode": "model: ${oc.decode:'${'}",
        "resolver-itself": "model: ${model}",
        "resolver-hydra": "model: ${hydra:runtime.cwd}",
        "results-escape": f"{head}io: {{results_dir: '${{oc.env:NOT_THERE}}/../../..'}}",
        "results-null": head + 'io: {results_dir: "a\\0b"}',
        "results-device": f"{head}io: {{results_dir: /dev/null}}",
        "results-fifo": f"{head}io: {{results_dir: pipe.yaml}}",
        "results-link": f"{head}io: {{results_dir: loop.yaml}}",
        "results-long": f"{head}io: {{results_dir: {'x' * 5000}}}",
        "model-null": 'model: "a\\0b"',
        "model-zero": "model: /dev/zero",
        "model-up": "model: ../../../../etc",
        "model-etc": "model: /etc",
        "dataset-null": 'model: tiny\ndataset: {path: "a\\0b.jsonl"}',
        "dataset-device": "model: tiny\ndataset: {path: /dev/null}",
        "dataset-folder": "model: tiny\ndataset: {path: /etc}",
        "trace": "model: tiny\nenergy: {name: replay, trace: /etc/passwd}",
        "trace-null": 'model: tiny\nenergy: {name: replay, trace: "a\\0b"}',
        "parent-passwd": "defaults: [/etc/passwd]",
        "parent-up": "defaults: [../../../../../../etc/hostname]",
        "parent-device": "defaults: [/dev/zero]",
        "parent-pipe": "defaults: [pipe]",
        "parent-itself": "defaults: [parent-itself]",
        "parent-null": 'defaults: ["a\\0b"]',
        "bomb": bomb,
        "deep": "[" * 5000,
        "deep-mapping": "a: {" * 5000,
        "recursive": "a: &a [*a]",
        "merge-recursive": "a: &a {<<: *a}",
        "long-key": f"{'k' * 200_000}: 1",
        "long-number": f"seed: {'9' * 5000}",
        "twice": "seed: 1\nseed: 2",
        "documents": "seed: 1\n---\nseed: 2",
        "list": "- 1",
        "text": "only words",
        "number": "7",
        "colon": "a: b: c",
        "tabs": "a:\n\t- b",
        "no-utf8": b"model: \xff\xfe\n",
        "utf16": "model: tiny\n".encode("utf-16"),
        "null": b"model: a\x00b\n",
        "escape": b"model: \x1b[31mred\n",
        "huge-int": f"{head}seed: {10**300}",
        "huge-float": f"{head}backend: {{name: simulated, prefill_s_per_token: 1.0e+308}}",
        "infinite": f"{head}cooldown: {{wait_s: .inf}}",
        "nan": f"{head}decoder: {{temperature: .nan}}",
        "negative": f"{head}batching: {{batch_size: -1}}",
        "cycles": f"{head}cycles: 1000000000",
        "surrogate": 'model: "\\uD800"',
        "secret-key": f"{head}backend: {{name: openai, url: 'http://u:p@evil.example/'}}",
        "url": f"{head}backend: {{name: openai, url: 'file:///etc/passwd'}}",
        "url-null": head + 'backend: {name: openai, url: "http://a\\0b"}',
        "backend-class": "model: tiny\nbackend: os.system",
        "backend-path": "model: tiny\nbackend: ../../conf/backend/mine",
        "preset-path": "preset: ../../../etc/passwd",
        "adapter": "model: tiny\nadapter: ../../x\nbackend: {name: pytorch, device: cpu}",
    }
    for i, paint in enumerate(PAINTS):
        word = json.dumps(paint)
        texts[f"paint-key-{i}"] = f"{word}: 1"
        if i < 8:  # composing takes a while
            texts[f"paint-dataset-{i}"] = f"model: tiny\ndataset: {{path: {json.dumps(f'./{paint}.jsonl')}}}"
            texts[f"paint-model-{i}"] = f"model: {json.dumps(f'./{paint}')}\nbackend: {{name: pytorch, device: cpu}}"
        texts[f"paint-option-{i}"] = f"model: tiny\nbackend: {word}"
    return {f"{name}.yaml": text for name, text in texts.items()}


def _names() -> dict[str, str | bytes]:
    """Return files whose names contain terminal sequences; their content is refused."""
    names = [paint.replace("/", "_") for paint in PAINTS]
    return {f"n{name}.yaml": "nothing_of_lem: 1\n" for name in names} | {
        "-y.yaml": "seed: x", "--help.yaml": "seed: x", " .yaml": "seed: x", "\udcff.yaml": "seed: x",
        "${model}.yaml": "seed: x", "[0-9]*.yaml": "seed: x",
    }  # fmt: skip


def _odd_kinds(folder: Path) -> None:
    os.mkfifo(folder / "pipe.yaml")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    (folder / "gone.yaml").symlink_to("not-there")
    (folder / "zero.yaml").symlink_to("/dev/zero")
    (folder / "up.yaml").symlink_to("../../..")
    (folder / "passwd.yaml").symlink_to("/etc/passwd")
    (folder / "folder.yaml").mkdir()
    (folder / "empty.yaml").touch()
    (folder / "gzip.yaml").write_bytes(gzip.compress(b"model: tiny"))
    with zipfile.ZipFile(folder / "zip.yaml", "w") as archive:
        archive.writestr("../../escaped", "x")
    with tarfile.open(folder / "tar.yaml", "w:gz") as archive:
        member = tarfile.TarInfo("../../escaped")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    (folder / "elf.yaml").write_bytes(Path(sys.executable).read_bytes()[:1000])


def _options(conf: Path, start: str) -> None:
    """Add options of config groups that are read just because they are there."""
    for group in ("backend", "dataset", "decoder", "energy", "preset"):
        (conf / group).mkdir(parents=True)
        (conf / group / "tagged.yaml").write_text("name: !!python/object/apply:os.system ['touch canary']\n")
        (conf / group / f"{ESC}[31mred.yaml").write_text(f"# {ESC}]0;title{BEL}\nseed: 1\n".replace(ESC, "\\e"))
        os.mkfifo(conf / group / "pipe.yaml")
    (conf / "backend" / "mine.yaml").write_text(f"name: openai\ncommand: {json.dumps(start)}\n")


def _checkout(git: Path, canary: Path) -> None:
    """Turn the folder into a checkout whose settings make git run programs."""
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "objects").mkdir()
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "config").write_text(
        f"[core]\n\trepositoryformatversion = 0\n\tfsmonitor = touch {canary}\n\tsshCommand = touch {canary}\n"
        f"[alias]\n\tstatus = !touch {canary}\n[filter \"x\"]\n\tclean = touch {canary}\n"
    )  # fmt: skip


# ------------------------------------------------------------------ which files are opened
@contextmanager
def in_time(what: str, limit_s: int = SLOW_S):
    """Fail if the command waits for something, such as the other end of a pipe."""

    def late(_number, _frame):
        raise AssertionError(f"{what} hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_printed(text: str, what: str) -> None:
    assert text == printable(text), f"{what} paints: {text!r}"


@pytest.fixture
def there(lem, odd, monkeypatch):
    """Return `lem`, run in the folder."""
    monkeypatch.chdir(odd)
    return lem


def files_of(folder: Path) -> list[str]:
    return sorted(os.path.relpath(path, folder) for path in folder.glob("*.yaml"))


@pytest.mark.processes
def test_configs_run_nothing_paint_nothing_and_each_refusal_is_a_line(there, odd, sings, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    for name in files_of(odd):
        shown = ascii(name)
        if name == "pipe.yaml":  # a pipe is read if a user names it: <(…)
            continue
        with in_time(shown):
            done = there("experiment", "-y", "--", f"./{name}")
        assert done.code == 2, f"{shown} ends with {done.code}: {done.err}"
        check_printed(done.err, shown)
        lines = done.err.rstrip("\n").split("\n")
        assert all(re.match(r"Error: |Warning: \S+\.env: |Warning: ", line) for line in lines), f"{shown}: {done.err!r}"
        assert any(line.startswith("Error: ") for line in lines)
        assert done.out == "", shown
        assert not sings[0].exists(), f"{shown} has run something"
        assert not (odd / "results").exists()


@pytest.mark.processes
def test_checking_them_runs_nothing_and_paints_nothing(there, odd, sings):
    for name in files_of(odd):
        if name == "pipe.yaml":
            continue
        for arguments in (("config", "validate"), ("config", "show")):
            with in_time(ascii(name)):
                done = there(*arguments, "--", f"./{name}")
            assert done.code in (0, 2)
            check_printed(done.out + done.err, f"{arguments} {name!a}")
    assert not sings[0].exists()


def test_a_batch_of_them_reports_each_problem_on_a_line(there, odd, sings):
    with in_time("the batch", BATCH_S):
        done = there("batch", "-y", "[c-g]*.yaml", "n*.yaml")
    assert done.code == 2
    check_printed(done.err, "the batch")
    assert all(re.match(r"Error: |Warning: ", line) for line in done.err.rstrip("\n").split("\n"))
    assert len(done.err.splitlines()) > 30
    assert not sings[0].exists()
    assert not (odd / "results").exists()
    assert not (odd / "multirun").exists()


@pytest.mark.parametrize(
    "arguments",
    [("datasets",), ("presets",), ("gpus",), ("config", "schema"), ("results", "list", "-a"), ("presets", "--json")],
)  # fmt: skip
def test_what_is_read_because_it_is_there_does_no_harm(arguments, there, sings):
    with in_time(" ".join(arguments)):
        done = there(*arguments)
    check_printed(done.out + done.err, " ".join(arguments))
    assert not sings[0].exists()


@pytest.mark.processes
def test_a_run_in_that_folder_runs_only_what_was_asked_for(odd, sings, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "prompts.txt").write_text("a prompt\nand another one\n")
    done = command(
        "experiment", "--backend", "simulated", "--model", f"m{ESC}[31m[red]", "-p", str(tmp_path / "prompts.txt"),
        "energy=none",
        "-y", "-o", str(tmp_path / "r"), cwd=odd,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "m\\u001b[31m[red]" in done.out
    check_printed(done.out + done.err, "the run")
    assert not sings[0].exists()
