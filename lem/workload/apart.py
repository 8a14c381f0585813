"""Calls a function in a separate process, so that the heavy libraries that it needs are not loaded into this process.

The `lem` command thus uses little memory while a worker runs, and a command that only checks files finishes sooner.
This module knows nothing about the functions that it calls.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

from lem.errors import LemError, RunError

P = ParamSpec("P")
T = TypeVar("T")


class _Bug(Exception):
    """An error that the function was not meant to raise; the message is the traceback from the other process."""


def call(library: str, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Call a function in a separate process, and return what it returns or raise what it raises.

    If this process has already loaded the library, the function is called here, because a separate process would save
    nothing.

    Args:
        library: the name of the heavy library that the function imports.
        function: a function of a module, with arguments and a result that can be pickled.
        arguments: its positional arguments.
        named: its keyword arguments.

    Raises:
        RunError: the process was killed, for example because memory ran out.
    """
    return call_without((), library, function, *arguments, **named)


def call_without(
    hidden: Sequence[str], library: str, function: Callable[P, T], *arguments: P.args, **named: P.kwargs
) -> T:
    """Call a function as `call` does; in the separate process, the hidden libraries appear not to be installed.

    For example, transformers imports torch only if torch is installed. If torch is hidden, transformers loads in a
    fraction of the time.
    """
    if library in sys.modules:
        return function(*arguments, **named)
    outcome, value = _answer(pickle.dumps((function, arguments, named)), hidden)
    if outcome == "raised":
        raise value from None
    return cast(T, value)


def _answer(request: bytes, hidden: Sequence[str]) -> tuple[str, Any]:
    # -P keeps a file in the user's working directory from shadowing a library.
    command = [sys.executable, "-P", "-m", "lem.workload.apart", *hidden]
    # In a session of its own, the process does not receive Ctrl-C from the terminal. Instead, it is killed below.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        to_child, from_child = process.stdin, process.stdout
        if to_child is None or from_child is None:
            raise AssertionError("both pipes were requested")
        try:
            # The pipe to the process stays open until the result has arrived; when it closes, the process ends.
            to_child.write(request)
            to_child.flush()
            answer = from_child.read()
        except BrokenPipeError:  # the process ended before it had read the request; its exit code shows why
            answer = b""
        finally:
            if sys.exc_info()[0] is not None:
                process.kill()
    if not answer:
        code = process.returncode
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise RunError(f"A process that lem started {how} before it returned a result; free some memory and try again.")
    return cast(tuple[str, Any], pickle.loads(answer))


# ------------------------------------------------------------------ in the other process
def main() -> None:
    """Read a function and its arguments from standard input, call it, and write the outcome to standard output."""
    # Standard output carries only the outcome; whatever libraries print goes to standard error.
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        # Python treats None as a module that does not exist, although the type of `sys.modules` does not allow None.
        cast(dict[str, Any], sys.modules)[name] = None
    function, arguments, named = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_parent, name="parent", daemon=True).start()
    try:
        done = ("returned", function(*arguments, **named))
    except LemError as error:
        done = ("raised", error)
    except Exception:
        done = ("raised", _Bug(traceback.format_exc()))
    with answer:
        pickle.dump(done, answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a normal exit would unload torch, which takes longer than many calls


def _end_with_the_parent() -> None:
    """End this process when its standard input closes."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    # The module is imported under its real name, so that its classes are the same in both processes.
    from lem.workload.apart import main as run

    run()
