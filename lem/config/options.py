"""Which options each group has and in which files they stand: those of conf/ that come with lem, and a user's own.

A user's options are the YAML files in `backend/`, `dataset/`, `decoder/`, `energy/` and `preset/` of a directory of
theirs: the one that --config-dir names, else `conf/` beside the config file or beside those that it inherits from,
else `conf/` in the working directory when there is no file. An option of theirs wins over a built-in one of the same
name. Reads no option; `lem.config.layers` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path

from lem.errors import ConfigError, did_you_mean
from lem.spec.schema import GROUPS

CONFIG_MODULE = "lem.conf"
FOLDER = "conf"
SUFFIXES = (".yaml", ".yml")
# Any hub dataset or local file; nobody chooses it by this name to get prompts.
CUSTOM = "custom"
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class OptionFile:
    """Where an option stands."""

    group: str
    name: str
    path: Path
    is_users: bool
    # A user's option that has taken a built-in one's name.
    shadows: bool = False


@dataclass(frozen=True, eq=False)
class Options:
    """What can be chosen by name; `folder` holds the user's options, if there are any."""

    folder: Path | None = None

    @classmethod
    def find(cls, config_dir: Path | None = None, config_file: Path | None = None) -> Options:
        """Return the options that are known beside a config file, or here without one.

        `lem.config.userfile.find_options` looks beside a file's parents as well.

        Raises:
            ConfigError: the directory that was named holds no options.
        """
        if config_dir is not None:
            if not any((config_dir / group).is_dir() for group in GROUPS):
                raise ConfigError(
                    f"{config_dir}: this config directory holds no options; "
                    f"they are YAML files in its folders {', '.join(f'{group}/' for group in GROUPS)}."
                )
            return cls(config_dir.resolve())
        folder = (config_file.parent if config_file else Path()) / FOLDER
        # lem's own conf/ is a package; in its checkout it is no user's.
        return cls(folder.resolve() if folder.is_dir() and not (folder / "__init__.py").exists() else None)

    @cached_property
    def _files(self) -> dict[str, dict[str, OptionFile]]:
        return {group: self._of_group(group) for group in GROUPS}

    def _of_group(self, group: str) -> dict[str, OptionFile]:
        found = dict(builtin(group))
        for path in _yaml_files(self.folder / group) if self.folder else ():
            found[path.stem] = OptionFile(group, path.stem, path, True, path.stem in builtin(group))
        return dict(sorted(found.items()))

    def names(self, group: str) -> tuple[str, ...]:
        """Return the names of a group's options."""
        return tuple(self._files[group])

    def get(self, group: str, name: str) -> OptionFile | None:
        """Return where an option stands, or None when there is no such option."""
        return self._files[group].get(name)

    def unknown(self, group: str, name: str) -> str:
        """Return the sentence about an option that does not exist."""
        names = [other for other in self.names(group) if (group, other) != ("dataset", CUSTOM)]
        more = "; or give a hub id (owner/name) or a local file" if group == "dataset" else ""
        return f"there is no '{name}'.{did_you_mean(name, names)} Choose one of {', '.join(names)}{more}."

    def is_source(self, name: str) -> bool:
        """Tell a dataset that is a hub id or a local file from one that is chosen by name."""
        if self.get("dataset", name):
            return False
        try:
            return "/" in name or name.endswith(DATA_SUFFIXES) or Path(name).exists()
        except (OSError, ValueError):
            return False


@cache
def builtin(group: str) -> dict[str, OptionFile]:
    """Return the options of a group that come with lem."""
    folder = Path(str(resources.files(CONFIG_MODULE))) / group
    return {path.stem: OptionFile(group, path.stem, path, False) for path in _yaml_files(folder)}


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES) if folder.is_dir() else []
