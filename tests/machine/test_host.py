"""The checkout that lem runs in, which may have come in an archive from someone else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lem.machine.host import git_state


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """Create a checkout with a commit, and make it the working directory."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.chdir(folder)
    git(folder, "init", "-q")
    (folder / "file").write_text("one")
    git(folder, "add", "file")
    git(folder, "commit", "-qm", "one")
    return folder


def test_the_commit_and_whether_there_are_changes(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_state() == (commit, False)
    (checkout / "file").write_text("two")
    assert git_state() == (commit, True)


def test_outside_of_a_checkout_there_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() == (None, None)


@pytest.mark.parametrize("setting", ["core.fsmonitor", "filter.x.clean", "filter.x.process", "core.hooksPath"])
def test_a_program_that_the_checkout_names_is_not_run(setting, checkout, tmp_path):
    canary, program = tmp_path / "canary", tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {canary}\ncat\n")
    program.chmod(0o755)
    (checkout / ".gitattributes").write_text("* filter=x\n")
    (checkout / "file").write_text("two")
    commit = git(checkout, "rev-parse", "HEAD")
    git(checkout, "config", setting, str(program))
    found = git_state()
    assert not canary.exists()
    assert found == (commit, True if setting == "core.hooksPath" else None)


def test_the_programs_would_have_run(checkout, tmp_path):
    """The test above can fail: plain git does run such a program."""
    canary, program = tmp_path / "canary", tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {canary}\ncat\n")
    program.chmod(0o755)
    git(checkout, "config", "core.fsmonitor", str(program))
    git(checkout, "status")
    assert canary.exists()
