"""The source tree where it is not installed: on a GPU machine, with the python3 that is there."""

from __future__ import annotations

import os

from benchmarks import ROOT

# Where the build leaves what is no part of the package.
SCRATCH = ROOT / "build" / "gpu-check"
PATH_HOOK = SCRATCH / "path"
# Tells Python where the packages are. Not by the root on its path: see `benchmarks`.
_HOOK = """
import importlib.util, sys

_FOLDERS = {folders!r}

class _Tree:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in _FOLDERS:
            folder = _FOLDERS[name]
            return importlib.util.spec_from_file_location(
                name, folder + "/__init__.py", submodule_search_locations=[folder]
            )

sys.meta_path.insert(0, _Tree)
"""


def write_path_hook() -> None:
    """Make the source tree importable in processes that have :func:`environment`."""
    PATH_HOOK.mkdir(parents=True, exist_ok=True)
    folders = {name: str(ROOT / name) for name in ("sbert_fast", "benchmarks", "tools")}
    folders["sbert_fast.kernels"] = str(ROOT / "kernels" / "triton")
    hook = _HOOK.format(folders=folders)
    PATH_HOOK.joinpath("sitecustomize.py").write_text(hook, encoding="utf-8")


def environment() -> dict[str, str]:
    """An environment in which Python finds this tree, whatever is installed."""
    path = (str(PATH_HOOK), os.environ.get("PYTHONPATH", ""))
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def use() -> None:
    """Import the package from this tree, here and in processes started from here."""
    write_path_hook()
    os.environ.update(environment())
    hook = PATH_HOOK / "sitecustomize.py"
    exec(compile(hook.read_text(encoding="utf-8"), str(hook), "exec"), {})
