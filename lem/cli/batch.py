"""`lem batch`: many config files, one after another or several at a time."""

from __future__ import annotations
