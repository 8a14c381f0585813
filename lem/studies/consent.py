"""The user's consent to the programs, code and keys that a config file names: requested once, then remembered.

Each agreement is a file in the user's state directory (`~/.local/state/lem/agreed`); its name is the digest of the
request and of the files that the request names. Requests from the command line need no consent, but are remembered so
that the experiment can be resumed. This module does not know what a configuration can ask for; `lem.config.trust` does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lem.config.problem import Problem, Problems, shortened
from lem.config.trust import Asked, Kind
from lem.errors import Interrupted
from lem.quantities import one_line
from lem.results.files import write_atomically
from lem.studies.ask import RunOptions, print_warnings

STATE_VARIABLE = "LEM_STATE_DIR"
# What happens if the user agrees, and the question that is asked. `lem.spec.rules` has the remedy after a refusal.
DOES = {
    "command": "starts a program with your permissions",
    "code": "runs Python code with your permissions",
    "key": "sends your key to another machine",
}
QUESTION = {"command": "Start this program?", "code": "Run this code?", "key": "Send this key?"}
FLAGS = {"command": "--allow-command", "code": "--allow-code", "key": "--allow-key"}
LONGEST_SHOWN = 300


def agreements() -> Path:
    """Return the directory of the agreements; `LEM_STATE_DIR` sets its parent directory."""
    import platformdirs

    return Path(os.environ.get(STATE_VARIABLE) or platformdirs.user_state_dir("lem")) / "agreed"


@dataclass
class Consents:
    """The user's consents, given earlier or during this command."""

    options: RunOptions
    _agreed: set[str] = field(default_factory=set)

    def require(self, asked: Iterable[Asked]) -> None:
        """Make sure that the user agrees to everything in `asked`; on a terminal, ask.

        In a dry run, only code needs consent: checking a model may load code, but no program is started and no key is
        sent.

        Raises:
            Problems: the user does not agree, or there is no terminal to ask on.
            Interrupted: the user pressed Ctrl-C.
        """
        lacking: list[Asked] = []
        for each in asked:
            if each.is_own:
                self._agree(each, permanently=not self.options.dry_run)
            elif each.digest in self._agreed or self._is_allowed(each.kind) or _is_remembered(each):
                continue
            elif self.options.dry_run and each.kind != "code":
                print_warnings(f"{_said(each)} A real run needs your consent, or {FLAGS[each.kind]}.")
                self._agreed.add(each.digest)
            elif _on_terminal() and _agrees(each):
                self._agree(each, permanently=True)
            else:
                lacking.append(each)
        if lacking:
            raise Problems(map(_refusal, lacking))

    def _is_allowed(self, kind: Kind) -> bool:
        options = self.options
        allowed = {"command": options.allow_command, "code": options.allow_code, "key": options.allow_key}
        return allowed[kind]

    def _agree(self, asked: Asked, *, permanently: bool) -> None:
        if permanently and asked.digest not in self._agreed and not _is_remembered(asked):
            _remember(asked)
        self._agreed.add(asked.digest)


def _is_remembered(asked: Asked) -> bool:
    return os.path.isfile(agreements() / asked.digest)


def _remember(asked: Asked) -> None:
    try:
        agreements().mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(agreements() / asked.digest, f"{asked.path}: {one_line(asked.text)}\n")
    except OSError as error:
        if not asked.is_own:
            print_warnings(f"Cannot save your consent in {agreements()}: {error.strerror}.")


def _said(asked: Asked) -> str:
    where = f"{asked.where}: " if asked.where else ""
    return f"{where}{asked.path} {DOES[asked.kind]}: {shortened(one_line(asked.text), LONGEST_SHOWN)}."


def _refusal(asked: Asked) -> Problem:
    message = f"this {DOES[asked.kind]}, and you have not agreed: {shortened(one_line(asked.text), LONGEST_SHOWN)}. "
    message += f"Run lem on a terminal to be asked once, or use {FLAGS[asked.kind]}."
    return Problem(f"{asked.kind}_not_agreed", asked.path, message, asked.where)


# ------------------------------------------------------------------ on a terminal
def _on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _agrees(asked: Asked) -> bool:
    """Show the full text of the request and ask for consent, even with --yes; the default answer is no."""
    import typer

    where = f"{asked.where}: " if asked.where else ""
    print(one_line(f"{where}{asked.path} {DOES[asked.kind]} (working directory: {Path.cwd()}):"), file=sys.stderr)
    print(f"    {one_line(asked.text)}", file=sys.stderr)
    try:
        return typer.confirm(QUESTION[asked.kind], default=False, err=True)
    except typer.Abort:
        raise Interrupted("Nothing was run.") from None
