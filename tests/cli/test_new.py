"""New config files and the JSON Schema: what is written validates, and means the same when it is uncommented."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import yaml
from jsonschema import Draft7Validator
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from lem.cli import interview
from lem.cli.draft import Draft, first_draft
from lem.cli.new import render
from lem.config.compose import prepare
from lem.config.file_schema import file_schema, type_words
from lem.config.options import Options, builtin
from lem.spec.experiment import Experiment
from lem.spec.schema import leaf, leaves

ROOT = Path(__file__).parents[2]
PRESETS = [None, *builtin("preset")]


def experiment(text: str) -> Experiment:
    Path("it.yaml").write_text(text, encoding="utf-8")
    return prepare(Path("it.yaml"), []).experiment()


def uncommented(text: str) -> str:
    """Uncomment every line whose # comes directly before a name."""
    return re.sub(r"^(\s*)#(\w)", r"\1\2", text, flags=re.MULTILINE)


# ------------------------------------------------------------------ the template
def test_without_a_terminal_the_template_is_printed_and_validates(lem):
    done = lem("config", "new")
    assert done.code == 0
    assert done.out.startswith("# yaml-language-server: $schema=.lem-schema.json\n")
    Path("my.yaml").write_text(done.out)
    assert lem("config", "validate", "my.yaml").code == 0
    assert yaml.safe_load(done.out) == {
        "model": "tiny",
        "fp_precision": "auto",
        "max_output_tokens": 128,
        "dataset": {"name": "sample", "sample_size": 10},
        "batching": {"batch_size": 1},
    }


def test_a_template_runs_as_it_is(lem):
    assert lem("config", "new", "-o", "my.yaml", "--preset", "quick-test").code == 0
    done = lem("experiment", "my.yaml", "--dry-run")
    assert done.code == 0, done.err


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backend", builtin("backend"))
def test_what_is_commented_out_is_what_applies_anyway(lem, preset, backend):
    text = render(first_draft(Options(), preset).choose("backend", backend))
    everything = uncommented(text)
    assert len(yaml.safe_load(everything)) == len({item.path.partition(".")[0] for item in leaves()} | {"preset"})
    assert experiment(everything) == experiment(text)
    assert experiment(text).backend.name == backend


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_not_undone_by_the_file_that_names_it(lem, preset):
    text = render(first_draft(Options(), preset))
    asked = [f"preset={preset or 'null'}", "model=tiny", "dataset=sample", "dataset.sample_size=10"]
    assert experiment(text) == prepare(None, asked).experiment()


def test_every_value_of_the_schema_is_explained():
    text = " ".join(render(first_draft(Options(), None)).replace("#", "").split())
    for item in leaves():
        if item.path.partition(".")[2] == "name":
            continue
        assert f"{item.path.rpartition('.')[2]}:" in text
        assert " ".join(item.description.split()) in text
        assert type_words(item) in text


def test_lines_fit_a_terminal():
    long = [line for line in render(first_draft(Options(), "throughput")).splitlines() if len(line) > 80]
    # The purposes of options are one line each.
    assert all(re.match(r" *#   \S+  ", line) for line in long)


def test_texts_are_written_as_they_were_given(lem):
    text = render(Draft(Options(), values={"model": "a: b #c ${seed}"}).choose("dataset", "it's, mine.txt"))
    assert yaml.safe_load(text)["model"] == "a: b #c ${seed}"
    made = experiment(text)
    assert (made.model, made.dataset.path) == ("a: b #c 42", "it's, mine.txt")


# ------------------------------------------------------------------ where it goes
def test_a_file_is_written_with_its_schema_beside_it(lem):
    done = lem("config", "new", "--yes", "-o", "deep/er/my.yaml")
    assert done.code == 0
    assert Path("deep/er/my.yaml").read_text() == lem("config", "new").out
    assert json.loads(Path("deep/er/.lem-schema.json").read_text()) == json.loads(lem("config", "schema").out)


def test_a_file_that_exists_stays_unless_forced(lem):
    Path("my.yaml").write_text("model: mine\n")
    done = lem("config", "new", "-o", "my.yaml")
    assert done.code == 2
    assert "--force" in done.err
    assert Path("my.yaml").read_text() == "model: mine\n"
    assert lem("config", "new", "-o", "my.yaml", "--force").code == 0
    assert "tiny" in Path("my.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "my.json"], "must end in .yaml or .yml"),
        (["-o", "folder.yaml"], "is a directory"),
        (["-o", "file.txt/my.yaml"], "cannot be written"),
        (["--preset", "bench"], "no option 'bench'"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(lem, arguments, says):
    Path("folder.yaml").mkdir()
    Path("file.txt").write_text("")
    done = lem("config", "new", *arguments)
    assert done.code == 2
    assert says in done.err
    assert done.err.count("\n") == 1


# ------------------------------------------------------------------ the questions
@pytest.fixture
def answers(lem) -> Iterator[object]:
    """Answer the questions with key strokes."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):

        def hold(*strokes: str, preset: str | None = None) -> Draft:
            # A question without a scripted answer ends the interview instead of waiting.
            keys.send_text("".join([*strokes, STOP]))
            return interview.ask_all(Options(), preset)

        yield hold


ENTER, DOWN, UP, ERASE, STOP, END = "\r", "\x1b[B", "\x1b[A", "\x15", "\x03", "\x04"


def test_accepting_all_is_the_template(answers):
    draft = answers(ENTER * 12)
    # The measured work is the same; the values of the first questions are set in both.
    assert experiment(render(draft)) == experiment(render(first_draft(Options(), None)))


def test_answers_are_written_and_validate(answers, lem):
    draft = answers(
        ERASE + "my/model" + ENTER,
        DOWN + ENTER,  # preset benchmark
        DOWN + ENTER,  # backend simulated
        UP * 2 + ENTER,  # dataset: two above sample
        ERASE + "7" + ENTER,
        ENTER,  # fp_precision: the preset's
        ERASE + "256" + ENTER,
        DOWN + ENTER,  # dynamic
        ERASE + "16" + ENTER,
        ENTER,  # 8192
        DOWN + ENTER,  # decoder: after deterministic comes factual
        UP + ENTER,  # energy: round to the last
        "DEU" + ENTER,
    )
    made = experiment(render(draft))
    assert (made.model, made.backend.name, made.fp_precision) == ("my/model", "simulated", "float16")
    assert (made.dataset.name, made.dataset.sample_size) == ("gsm8k", 7)
    assert (made.batching.strategy, made.batching.batch_size, made.batching.max_tokens_per_batch) == (
        "dynamic",
        16,
        8192,
    )
    assert (made.max_output_tokens, made.decoder.name, made.energy.country_iso_code) == (256, "factual", "DEU")
    assert draft.choices["preset"] == "benchmark"
    assert "fp_precision" not in draft.values
    assert made.warmup.prompts == 10  # the preset's value


def test_a_preset_that_was_given_is_not_asked_for(answers):
    assert answers(ENTER * 11, preset="quick-test").choices == {"preset": "quick-test", "dataset": "sample"}


def test_a_dataset_of_the_hub_after_a_wrong_one(answers):
    elsewhere = DOWN * 2 + ENTER  # the last, two below sample
    draft = answers(ENTER * 3, elsewhere, "nosuch" + ENTER, ERASE + "owner/name" + ENTER, ENTER * 8)
    assert draft.choices["dataset"] == "owner/name"


@pytest.mark.parametrize("key", [STOP, END])
def test_leaving_is_no_answer(answers, key):
    with pytest.raises((KeyboardInterrupt, EOFError)):
        answers(ERASE + key)


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("batching.batch_size", "4", 4),
        ("decoder.temperature", "0.5", 0.5),
        ("dataset.sample_size", "", None),
        ("model", "a/b", "a/b"),
        ("revision", "123", "123"),
        ("energy.country_iso_code", " DEU ", "DEU"),
    ],
)
def test_an_answer_is_taken_by_its_type(path, text, value):
    assert interview.parsed(leaf(path), text) == value
    assert interview.problem_with(first_draft(Options(), None), leaf(path), text) == ""


@pytest.mark.parametrize(
    ("path", "text", "says"),
    [
        ("batching.batch_size", "0", "greater than or equal to 1"),
        ("batching.batch_size", "", "valid integer"),
        ("batching.batch_size", "four", "valid integer"),
        ("batching.batch_size", "4.5", "valid integer"),
        ("dataset.sample_size", "-1", "greater than or equal to 1"),
        ("energy.country_iso_code", "Germany", "pattern"),
        ("model", "", "needs a model"),
    ],
)
def test_a_wrong_answer_is_explained_in_a_sentence(path, text, says):
    assert says in interview.problem_with(first_draft(Options(), None), leaf(path), text)


# ------------------------------------------------------------------ on a terminal
class Terminal:
    """`lem config new …` on a pseudo-terminal of 80 columns, in a child process."""

    def __init__(self, *arguments: str) -> None:
        self.shown = ""
        self.child, self.handle = pty.fork()
        if self.child == 0:
            os.environ.update(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1")
            os.execv(sys.executable, [sys.executable, "-m", "lem", "config", "new", *arguments])
        fcntl.ioctl(self.handle, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def answer(self, question: str, keys: str) -> None:
        """Wait for a question, then send key strokes."""
        self._read(until=question)
        time.sleep(0.2)  # until the terminal has been put into raw mode
        os.write(self.handle, keys.encode())

    def ended(self) -> int:
        """Wait for the end and return the exit code."""
        self._read(until=None)
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])

    def _read(self, until: str | None) -> None:
        start, end = len(self.shown), time.monotonic() + 60
        while time.monotonic() < end:
            if not select.select([self.handle], [], [], 0.5)[0]:
                continue
            try:
                data = os.read(self.handle, 65536)
            except OSError:  # the child has closed the terminal
                data = b""
            if not data:
                assert until is None, f"ended before {until!r}: {self.shown}"
                return
            self.shown += data.decode(errors="replace")
            if until and until in self.shown[start:]:
                return
        raise AssertionError(f"no {until!r} in {self.shown}")


@pytest.fixture
def terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Terminal


def test_a_person_makes_a_file_on_a_terminal(terminal, lem):
    person = terminal("--preset", "quick-test")
    person.answer("model:", ENTER)
    person.answer("Backend:", DOWN + ENTER)
    person.answer("Dataset:", ENTER)
    person.answer("sample_size:", ERASE + "0" + ENTER)
    person.answer("greater than or equal to 1", ERASE + "3" + ENTER)
    for question in ("fp_precision:", "max_output_tokens:", "strategy:", "batch_size:", "Decoder:", "Energy:"):
        person.answer(question, ENTER)
    person.answer("country_iso_code:", ENTER)
    assert person.ended() == 0, person.shown
    assert "Wrote experiment.yaml" in person.shown
    assert lem("config", "validate", "experiment.yaml").code == 0
    made = prepare(Path("experiment.yaml"), []).experiment()
    assert (made.backend.name, made.dataset.sample_size, made.max_output_tokens) == ("simulated", 3, 32)


def test_ctrl_c_leaves_no_file(terminal):
    person = terminal()
    person.answer("model:", ENTER)
    person.answer("Preset:", STOP)
    assert person.ended() == 130
    assert "Nothing was written." in person.shown
    assert list(Path().iterdir()) == []


def test_on_a_terminal_an_existing_file_is_asked_about(terminal):
    Path("experiment.yaml").write_text("model: mine\n")
    person = terminal()
    person.answer("Replace it?", ENTER)
    assert person.ended() == 0
    assert "Nothing was written." in person.shown
    assert Path("experiment.yaml").read_text() == "model: mine\n"


# ------------------------------------------------------------------ the schema
@pytest.fixture(scope="module")
def validator() -> Draft7Validator:
    schema = file_schema(Options())
    Draft7Validator.check_schema(schema)
    return Draft7Validator(schema)


EXAMPLES = {
    **{str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "conf" / "preset").glob("*.yaml"))},
    **{
        f"{page.name} {i}": text
        for page in (
            ROOT / "README.md",
            ROOT / "docs" / "how-to" / "configuring.md",
            ROOT / "docs" / "how-to" / "grids.md",
        )
        for i, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL))
        if not text.startswith("# conf/dataset/")  # an option of one group, no config file
    },
    **{f"template {preset}": render(first_draft(Options(), preset)) for preset in PRESETS},
    "all values": uncommented(render(first_draft(Options(), None))),
    "interpolations": "max_input_tokens: ${max_output_tokens}\nbatching: {batch_size: '${seed}'}\n",
    "no preset": "preset: null\ndefaults: [a, {dataset: alpaca}, _self_]\n",
    "dataset of the hub": "dataset: owner/name\n",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_schema_accepts_what_a_file_may_hold(validator, name):
    assert [error.message for error in validator.iter_errors(yaml.safe_load(EXAMPLES[name]))] == []


WRONG = {
    "unknown key": "batch_size: 1",
    "unknown inner key": "batching: {batch_sise: 1}",
    "text for a number": "batching: {batch_size: '4'}",
    "number for a text": "model: 4",
    "out of range": "seed: -1",
    "unknown word": "fp_precision: fp8",
    "unknown option": "backend: pytorsh",
    "unknown preset": "preset: bench",
    "another backend's key": "backend: {name: simulated, device: cpu}",
    "a list for a part": "warmup: [1]",
    "a mapping as preset": "preset: {name: benchmark}",
    "a group that is none": "defaults: [{batching: big}]",
    "a text as defaults": "defaults: base",
    "hydra's key": "_target_: os.system",
}


@pytest.mark.parametrize("name", WRONG)
def test_the_schema_refuses_what_lem_refuses(validator, lem, name):
    assert not validator.is_valid(yaml.safe_load(WRONG[name]))
    Path("wrong.yaml").write_text(WRONG[name])
    assert lem("config", "validate", "wrong.yaml").code == 2


@pytest.mark.parametrize("item", list(leaves()), ids=lambda item: item.path)
def test_every_value_is_in_the_schema_with_its_type(validator, item):
    if item.path.endswith(".name"):
        return
    holder: dict = {}
    *parents, last = item.path.split(".")
    inner = holder
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = item.default
    assert validator.is_valid(holder)
    inner[last] = ["a list"] if type_words(item).startswith("mapping") else {"a": "mapping"}
    assert not validator.is_valid(holder)
    assert item.description in json.dumps(validator.schema, ensure_ascii=False)
    assert get_args(item.annotation)


def test_grid_files_are_valid(validator, lem):
    Path("base.yaml").write_text("model: tiny\ndataset: sample\n")
    vary = ("--vary", "batch_size=1,2", "--vary", "preset=benchmark,null", "--vary", "backend=simulated")
    for flags in ((), ("--as-group", "--force")):
        assert lem("config", "generate-grid", "base.yaml", *vary, "-o", "grid", *flags).code == 0
        files = set(Path("grid").glob("*.yaml")) - {Path("grid/grid.yaml")}
        assert len(files) == 4
        for file in files:
            assert validator.is_valid(yaml.safe_load(file.read_text())), file


def test_a_users_own_options_are_in_the_schema(lem):
    Path("conf/preset").mkdir(parents=True)
    Path("conf/preset/mine.yaml").write_text("# Mine\nseed: 1\n")
    done = lem("config", "schema")
    assert done.code == 0
    assert Draft7Validator(json.loads(done.out)).is_valid({"preset": "mine"})
    assert not Draft7Validator(file_schema(Options())).is_valid({"preset": "mine"})
