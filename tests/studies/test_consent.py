"""What a file names runs only after the user has agreed; a canary file that it would write shows whether it has run."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lem.config.compose import prepare
from lem.config.trust import all_asked, asked_by
from lem.results.store import Store
from lem.studies.ask import RunOptions
from lem.studies.consent import Consents, agreements
from tests.conftest import command

pytestmark = pytest.mark.processes

CANARY = "canary"
# The program named by backend.command: it shows that it has run, and is not a server.
PROGRAM = f"import pathlib, sys\npathlib.Path({CANARY!r}).write_text('sung')\nsys.exit(3)\n"
COMMAND = f"{sys.executable} program.py {{port}}"
CONFIG = f"""\
model: tiny
backend: {{name: openai, command: '{COMMAND}', start_timeout_s: 20, model_name: m}}
dataset: {{path: 'builtin:sample', sample_size: 2}}
energy: none
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder from someone else: a config file and the program that it names; no consent has been given yet."""
    monkeypatch.setenv("LEM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(CONFIG)
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def has_run(folder: Path) -> bool:
    """Return whether the canary was written, and remove it."""
    canary = folder / CANARY
    sung = canary.exists()
    canary.unlink(missing_ok=True)
    return sung


def gets_through(lem, *arguments: str) -> bool:
    """Return whether a command asks for no consent; its results cannot be written, so nothing runs."""
    done = lem(*arguments, "-o", "program.py")
    assert done.code == 2
    assert ("not agreed" in done.err) != ("program.py is a file" in done.err)
    return "not agreed" not in done.err


def typed(answer: str, *arguments: str, cwd: Path) -> tuple[int, str]:
    """Run `lem …` on a terminal and answer its questions; return the exit code and the output."""
    child, ours = pty.fork()
    if child == 0:
        os.chdir(cwd)
        os.execv(sys.executable, [sys.executable, "-m", "lem", *arguments])
    shown, until_s = b"", time.monotonic() + 120
    answered = 0
    try:
        while time.monotonic() < until_s and (chunk := os.read(ours, 65536)):
            shown += chunk
            if shown.count(b"[y/N]") > answered:
                answered += 1
                os.write(ours, f"{answer}\n".encode())
    except OSError:  # the end of the terminal
        pass
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), shown.decode()


# ------------------------------------------------------------------ a program
@pytest.mark.parametrize(
    "arguments",
    [
        ("experiment", "my.yaml", "-y"),
        ("experiment", "my.yaml", "-y", "--force"),
        ("experiment", "my.yaml", "-y", "--multirun", "seed=1,2"),
        ("batch", "my.yaml", "-y"),
        ("batch", "my.yaml", "my.yml", "-y", "--parallel", "2"),
        ("experiment", "child.yaml", "-y"),
        ("experiment", "-y", "backend=mine", "--model", "tiny", "-d", "sample"),
        ("experiment", "-y", "preset=mine", "--model", "tiny", "-d", "sample"),
        ("experiment", "names.yaml", "-y", "backend.command=${model}"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_a_program_that_a_file_names_is_not_started_unasked(arguments, folder, lem):
    (folder / "my.yml").write_text(f"{CONFIG}seed: 1\n")
    (folder / "child.yaml").write_text("defaults: [my]\nseed: 7\n")
    for group, text in {"backend": f"name: openai\ncommand: '{COMMAND}'", "preset": CONFIG}.items():
        (folder / "conf" / group).mkdir(parents=True)
        (folder / "conf" / group / "mine.yaml").write_text(text)
    (folder / "names.yaml").write_text(f"model: '{COMMAND}'\nbackend: openai\ndataset: sample\nenergy: none\n")
    done = lem(*arguments)
    assert done.code == 2, done.err
    assert not has_run(folder)
    assert not (folder / "results").exists()
    for line in done.err.splitlines():
        assert line.startswith("Error: ")
        assert "backend.command: this starts a program with your permissions, and you have not agreed" in line
        assert "use --allow-command." in line
    assert not list(folder.glob("state/agreed/*"))


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("lem.cli.direct", ("--config", "my.yaml", "-o", "program.py")),
        (
            "lem.cli.hydra_app",
            ("backend=mine", "model=tiny", "dataset=sample", "energy=none", "io.results_dir=program.py"),
        ),
    ],
)
def test_the_direct_form_and_plain_hydra_do_not_start_it_unasked(module, arguments, folder):
    (folder / "conf" / "backend").mkdir(parents=True)
    (folder / "conf" / "backend" / "mine.yaml").write_text(f"name: openai\ncommand: '{COMMAND}'\n")
    for allow in ((), ("--allow-command",)):
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments, *allow],
            cwd=folder, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 2
        assert ("not agreed" in done.stderr) == (not allow), done.stderr
        assert not has_run(folder)


def test_plain_hydras_own_words_need_no_consent(folder):
    words = (f'backend.command="{COMMAND}"', "backend=openai", "model=tiny", "dataset=sample", "energy=none")
    done = subprocess.run(
        [sys.executable, "-m", "lem.cli.hydra_app", *words, "io.results_dir=program.py"],
        cwd=folder, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "not agreed" not in done.stderr
    assert "program.py is a file" in done.stderr


def test_a_flag_allows_it_this_time_only(folder, lem):
    assert command("experiment", "my.yaml", "-y", "--allow-command", cwd=folder).code == 1  # it is not a server
    assert has_run(folder)
    assert not gets_through(lem, "experiment", "my.yaml", "-y")
    assert not gets_through(lem, "experiment", "my.yaml", "-y", "--allow-code", "--allow-key")


def test_the_workers_of_a_batch_run_what_was_allowed(folder):
    (folder / "my.yml").write_text(f"{CONFIG}seed: 1\n")
    done = command("batch", "my.yaml", "my.yml", "-y", "--parallel", "2", "--allow-command", cwd=folder)
    assert done.code == 1
    assert has_run(folder)


def test_the_command_lines_own_words_need_no_consent(folder, lem):
    own = f"backend.command='{COMMAND}'"
    (folder / "other.yaml").write_text(CONFIG.replace(COMMAND, "something-else {port}"))
    for arguments in (("other.yaml", own), ("backend=openai", own, "--model", "tiny", "-d", "sample", "energy=none")):
        assert gets_through(lem, "experiment", *arguments, "-y")
    # They are stored, so that the experiment can be resumed.
    assert len(list(folder.glob("state/agreed/*"))) == 1
    assert gets_through(lem, "experiment", "my.yaml", "-y")


def test_on_a_terminal_the_user_sees_the_command_and_is_asked_once_for_it(folder, lem):
    code, shown = typed("n", "experiment", "my.yaml", "-y", cwd=folder)
    assert code == 2
    assert f"    {COMMAND}\r\n" in shown
    assert f"with your permissions (working directory: {folder})" in shown
    assert not has_run(folder)
    code, shown = typed("y", "experiment", "my.yaml", "-y", cwd=folder)
    assert code == 1
    assert shown.count("Start this program?") == 1
    assert has_run(folder)
    # Consent is given once for that text: it is not requested again, on a terminal, without one, or in another file.
    (folder / "copy.yaml").write_text(f"{CONFIG}seed: 3\n")
    for file in ("my.yaml", "copy.yaml"):
        assert gets_through(lem, "experiment", file, "-y")
    # A different text, or the same text that names a different program, needs consent again.
    (folder / "copy.yaml").write_text(CONFIG.replace("{port}", "{port} x"))
    assert not gets_through(lem, "experiment", "copy.yaml", "-y")
    (folder / "program.py").write_text(f"{PROGRAM}# changed")
    assert not gets_through(lem, "experiment", "my.yaml", "-y")
    assert not has_run(folder)


def test_a_batch_asks_once_for_the_same_text(folder):
    (folder / "my.yml").write_text(f"{CONFIG}seed: 1\n")
    code, shown = typed("y", "batch", "my.yaml", "my.yml", "-y", "-o", "program.py", cwd=folder)
    assert code == 2
    assert shown.count("Start this program?") == 1
    assert "program.py is a file" in shown


def test_a_dry_run_and_the_checks_of_files_start_nothing_and_need_no_consent(folder, lem):
    done = lem("experiment", "my.yaml", "--dry-run")
    assert done.code == 0
    assert "Warning: my.yaml:2: backend.command starts a program with your permissions" in done.err
    for arguments in (
        ("batch", "my.yaml", "--dry-run"),
        ("config", "validate", "my.yaml"),
        ("config", "show", "my.yaml"),
        ("config", "generate-grid", "my.yaml", "--vary", "seed=1,2", "-o", "grid"),
    ):
        assert lem(*arguments).code == 0
    assert not has_run(folder)
    done = lem("batch", "grid", "-y")
    assert done.code == 2
    assert "my.yaml:2: backend.command" in done.err
    assert not has_run(folder)


@pytest.fixture
def unfinished(folder, lem) -> str:
    """Begin an experiment in theirs/, as if it came from others, with its command as an override; return its id."""
    own = ("backend=openai", f"backend.command='{COMMAND}'", "--model", "tiny", "-d", "sample", "energy=none", "-y")
    assert command("experiment", *own, "-o", "theirs", cwd=folder).code == 1
    assert has_run(folder)
    (name,) = Store(folder / "theirs").ids()
    return name


def test_resuming_somebodys_experiment_needs_consent(folder, unfinished, lem, monkeypatch):
    plan = Store(folder / "theirs").find(unfinished).plan()
    # A command that was on the command line when the experiment began needs no consent later.
    Consents(RunOptions(yes=True)).require(all_asked(plan.experiment))
    monkeypatch.setenv("LEM_STATE_DIR", str(folder / "of-another-user"))
    resume = ("experiment", "--resume", unfinished, "-o", "theirs", "-y")
    done = lem(*resume)
    assert done.code == 2
    assert f"theirs/raw/{unfinished}/spec.json: backend.command" in done.err
    assert not has_run(folder)
    assert command(*resume, "--allow-command", cwd=folder).code == 1
    assert has_run(folder)


def test_a_directory_that_only_claims_to_hold_the_same_experiment_is_not_found(folder, unfinished):
    store = Store(folder / "theirs")
    spec = store.find(unfinished).path / "spec.json"
    (fingerprint,) = [file.read_text() for file in (folder / "theirs" / "unfinished").iterdir()]
    assert [each.id for each in store.unfinished(fingerprint)] == [unfinished]
    spec.write_text(spec.read_text().replace("program.py", "another.py"))
    assert store.unfinished(fingerprint) == []


def test_what_cannot_be_remembered_still_runs(folder, monkeypatch):
    monkeypatch.setenv("LEM_STATE_DIR", str(folder / "my.yaml"))
    code, shown = typed("y", "experiment", "my.yaml", "-y", "-o", "program.py", cwd=folder)
    assert code == 2
    assert "Cannot save your consent" in shown
    assert "program.py is a file" in shown


# ------------------------------------------------------------------ code
CODE = """\
import pathlib
pathlib.Path({canary!r}).write_text('sung')
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "mine"
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def with_code(folder, tiny_folder) -> Path:
    """Add a local model whose config.json names Python code in the same folder."""
    model = folder / "model"
    shutil.copytree(tiny_folder, model)
    config = json.loads((model / "config.json").read_text())
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config |= {"model_type": "mine", "architectures": ["Model"], "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(CODE.format(canary=str(folder / CANARY)))
    lines = "model: ./model\ntrust_remote_code: true\nchat_template: true\nbackend: {name: pytorch, device: cpu}\n"
    (folder / "my.yaml").write_text(f"{lines}dataset: {{path: 'builtin:sample', sample_size: 1}}\nenergy: none\n")
    return folder


@pytest.mark.parametrize(
    "arguments", [("experiment",), ("experiment", "--dry-run"), ("batch",), ("batch", "--dry-run")]
)
def test_code_of_a_model_is_not_run_unasked_not_even_by_the_checks(arguments, with_code, lem, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(with_code / "modules"))
    first, *flags = arguments
    done = lem(first, "my.yaml", "-y", *flags)
    assert done.code == 2
    assert (
        "my.yaml:2: trust_remote_code: this runs Python code with your permissions, and you have not agreed" in done.err
    )
    assert "the Python code in model: code.py" in done.err
    assert "--allow-code" in done.err
    assert not has_run(with_code)
    assert not (with_code / "modules").exists()


def test_allowed_code_runs_and_changed_code_is_asked_for_anew(with_code, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(with_code / "modules"))
    file = with_code / "my.yaml"
    file.write_text(file.read_text().replace("chat_template: true\n", ""))
    run = ("experiment", "my.yaml", "-y", "max_output_tokens=2")
    command(*run, "--allow-code", cwd=with_code)
    assert has_run(with_code)
    (asked,) = asked_by((composed := prepare(file, ())).experiment(), composed.sources)
    agreements().mkdir(parents=True)
    (agreements() / asked.digest).touch()
    command(*run, cwd=with_code)
    assert has_run(with_code)
    (with_code / "model" / "code.py").write_text(CODE.format(canary=str(with_code / CANARY)) + "# changed")
    assert command(*run, cwd=with_code).code == 2
    assert not has_run(with_code)


# ------------------------------------------------------------------ which source names it
def found(folder: Path, text: str, *overrides: str) -> dict[str, bool]:
    (folder / "some.yaml").write_text(text)
    composition = prepare(folder / "some.yaml", overrides)
    return {each.path: each.is_own for each in asked_by(composition.experiment(), composition.sources)}


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("trust_remote_code: true", (), {"trust_remote_code": False}),
        ("trust_remote_code: true", ("backend=simulated",), {}),
        ("seed: 1", ("trust_remote_code=true",), {"trust_remote_code": True}),
        ("trust_remote_code: false", ("trust_remote_code=true",), {"trust_remote_code": True}),
        ("trust_remote_code: true", ("trust_remote_code=false",), {}),
        (
            "backend: {name: vllm, engine_args: {worker_cls: a.B}}",
            ("trust_remote_code=true",),
            {"trust_remote_code": True, "backend.engine_args.worker_cls": False},
        ),
        (
            "backend: {name: vllm, engine_args: {compilation_config: {backend: a.b}}}",
            ("trust_remote_code=true",),
            {"trust_remote_code": True, "backend.engine_args.compilation_config": False},
        ),
        (
            "backend: {name: tensorrt, extra_args: {kv_connector_config: {connector_module: a}}}",
            ("trust_remote_code=true",),
            {"trust_remote_code": True, "backend.extra_args.kv_connector_config": False},
        ),
        ("backend: {name: openai, url: 'http://127.0.0.1:1'}", (), {}),
        ("backend: {name: openai, url: 'http://elsewhere.example'}", (), {"backend.api_key_env": False}),
        ("backend: openai", ("backend.url=http://elsewhere.example",), {"backend.api_key_env": True}),
        (
            "backend: {name: openai, api_key_env: OPENAI_API_KEY}",
            ("backend.url=http://elsewhere.example",),
            {"backend.api_key_env": False},
        ),
    ],
)
def test_what_is_asked_for_and_whose_words_it_is(text, overrides, expected, folder, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert found(folder, f"model: tiny\n{text}\n", *overrides) == expected


@pytest.mark.parametrize(
    ("text", "is_asked"),
    [
        ("backend: {name: openai, url: 'http://elsewhere.example/${oc.env:A_SECRET}'}", True),
        ("backend: {name: openai, url: 'http://elsewhere.example', extra_body: {x: '${oc.env:A_SECRET}'}}", True),
        (
            "revision: '${oc.env:A_SECRET}'\n"
            "backend: {name: openai, url: 'http://elsewhere.example', model_name: 'a ${revision}'}",
            True,
        ),
        (
            "revision: A_SECRET\n"
            "backend: {name: openai, url: 'http://elsewhere.example', model_name: '${oc.env:${revision}}'}",
            True,
        ),
        ("backend: {name: openai, url: 'http://127.0.0.1:1', extra_body: {x: '${oc.env:A_SECRET}'}}", False),
        ("revision: '${oc.env:A_SECRET}'\nbackend: {name: openai, url: 'http://elsewhere.example'}", False),
    ],
)
def test_variables_that_a_file_would_send_to_another_machine_are_asked_for(text, is_asked, folder, lem, monkeypatch):
    monkeypatch.setenv("A_SECRET", "swordfish")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (folder / "my.yaml").write_text(f"model: tiny\ndataset: sample\nenergy: none\n{text}\n")
    assert gets_through(lem, "experiment", "-y", "my.yaml") != is_asked
    if is_asked:
        done = lem("experiment", "-y", "my.yaml")
        assert "the value of A_SECRET to http://elsewhere.example:80. " in done.err
        assert "swordfish" not in done.err
        assert gets_through(lem, "experiment", "-y", "my.yaml", "--allow-key")


def test_a_key_that_is_not_set_is_not_sent(folder, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert found(folder, "model: tiny\nbackend: {name: openai, url: 'http://elsewhere.example'}\n") == {}


def test_words_are_the_same_wherever_they_come_from(folder):
    own = prepare(None, ("model=tiny", "backend=openai", f"backend.command='{COMMAND}'")).experiment()
    in_file = prepare(folder / "my.yaml", ()).experiment()
    (first,), (second,) = all_asked(own), all_asked(in_file)
    assert first.digest == second.digest
