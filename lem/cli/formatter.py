"""Imports typer's formatter for help and usage errors, without the parts of rich that lem's help never uses."""

from __future__ import annotations

import sys
from types import ModuleType

# Modules of rich, with the class that the formatter imports from each. Together, they take more than a third of the
# formatter's import time. Help texts in Markdown need the first module, and formatted tracebacks need the second; lem's
# commands use neither.
UNUSED = {"rich.markdown": "Markdown", "rich.traceback": "Traceback"}


def import_formatter() -> None:
    """Import the formatter, with empty classes in place of the rich classes that lem never uses.

    The stand-ins are removed afterward, so that later imports find rich's own modules.
    """
    if "typer.rich_utils" in sys.modules:
        return
    absent = {module: name for module, name in UNUSED.items() if module not in sys.modules}
    for module, name in absent.items():
        sys.modules[module] = ModuleType(module)
        setattr(sys.modules[module], name, type(name, (), {}))
    try:
        import typer.rich_utils  # noqa: F401 - typer uses it from now on
    finally:
        for module in absent:
            del sys.modules[module]
