"""The options of each group and their files: the built-in ones in conf/, and the user's own.

A user's options are YAML files in the folders `backend/`, `dataset/`, `decoder/`, `energy/` and `preset/` of one
directory. This is the directory given by --config-dir or, if none is given, `conf/` beside the config file or beside a
file that it inherits from. Without a config file, it is `conf/` in the working directory. A user's option replaces a
built-in one of the same name. This module only finds options; `lem.config.layers` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path

from lem.errors import ConfigError, did_you_mean
from lem.spec.schema import GROUPS
from lem.workload.file import SUFFIXES as SOURCE_SUFFIXES

CONFIG_MODULE = "lem.conf"
FOLDER = "conf"
# The folder of launchers, which a user's directory may have too; `lem.config.launcher` reads them.
LAUNCHERS = "hydra/launcher"
SUFFIXES = (".yaml", ".yml")
# The option behind every hub dataset and local file that is chosen; by itself, it names no prompts.
CUSTOM = "custom"


@dataclass(frozen=True)
class OptionFile:
    """An option and its file."""

    group: str
    name: str
    path: Path
    is_users: bool
    # Whether this is a user's option with the name of a built-in option.
    shadows: bool = False


@dataclass(frozen=True, eq=False)
class Options:
    """The options that can be chosen by name; `folder` is the directory of the user's own options, if any."""

    folder: Path | None = None

    @classmethod
    def find(cls, config_dir: Path | None = None, config_file: Path | None = None) -> Options:
        """Return the options available to a config file or, if none is given, in the working directory.

        `lem.config.userfile.find_options` also looks beside the files from which a config file inherits.

        Raises:
            ConfigError: the given directory contains no options.
        """
        if config_dir is not None:
            if not any((config_dir / group).is_dir() for group in (*GROUPS, LAUNCHERS)):
                raise ConfigError(
                    f"{config_dir}: this config directory contains no options. "
                    f"Options are YAML files in its folders {', '.join(f'{group}/' for group in GROUPS)}."
                )
            return cls(config_dir.resolve())
        folder = (config_file.parent if config_file else Path()) / FOLDER
        # lem's own conf/ is a package, and does not count as the user's folder, even if lem runs in the directory that
        # contains it.
        return cls(folder.resolve() if folder.is_dir() and not (folder / "__init__.py").exists() else None)

    @cached_property
    def _files(self) -> dict[str, dict[str, OptionFile]]:
        found = {group: dict(builtin(group)) for group in GROUPS}
        for group, files in found.items():
            for path in _yaml_files(self.folder / group) if self.folder else ():
                files[path.stem] = OptionFile(group, path.stem, path, True, path.stem in builtin(group))
        return {group: dict(sorted(files.items())) for group, files in found.items()}

    def names(self, group: str) -> tuple[str, ...]:
        """Return the names of a group's options."""
        return tuple(self._files[group])

    def get(self, group: str, name: str) -> OptionFile | None:
        """Return an option's file, or None if there is no such option."""
        return self._files[group].get(name)

    def unknown(self, group: str, name: str) -> str:
        """Return the message for an option that does not exist."""
        names = [other for other in self.names(group) if (group, other) != ("dataset", CUSTOM)]
        more = ", or give a hub id (owner/name) or a local file" if group == "dataset" else ""
        return f"there is no option '{name}'.{did_you_mean(name, names)} Choose one of {', '.join(names)}{more}."

    def is_source(self, name: str) -> bool:
        """Return whether a dataset is a hub id or a local file rather than a named option."""
        if self.get("dataset", name):
            return False
        try:
            return "/" in name or name.lower().endswith(SOURCE_SUFFIXES) or Path(name).exists()
        except (OSError, ValueError):
            return False


@cache
def builtin(group: str) -> dict[str, OptionFile]:
    """Return the options of a group that come with lem."""
    folder = Path(str(resources.files(CONFIG_MODULE))) / group
    return {path.stem: OptionFile(group, path.stem, path, False) for path in _yaml_files(folder)}


def _yaml_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    # Reading from a named pipe would block.
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
