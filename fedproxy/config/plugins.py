"""Plugins: modules of the user's own, imported on the user's own word alone.

Importing a module runs it. So a recipe file, which may come from anywhere, can name the plugins that it needs, and the
command line has to name them again.
"""

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fedproxy.errors import ConfigError, one_line

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def trusted_plugins(given: Mapping[str, Any], files: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return the modules that the command line names.

    Args:
        given: What the command line sets.
        files: Every file that is read, with what it sets.

    Raises:
        ConfigError: If a file lists plugins and the command line is silent about them, or a name is not a module's.
    """
    if given.get("plugins") is not None:
        return _module_names(given["plugins"], "plugins")
    for where, layer in reversed(files):
        listed = _module_names(layer.get("plugins") or [], f"{where}: plugins")
        if listed:
            words = ",".join(listed)
            raise ConfigError(
                f"{where}: plugins lists {words}, Python code that would run with your rights; look at it, then add "
                f"plugins=[{words}] to the command, or plugins=[] to go without"
            )
    return []


def import_plugins(modules: Sequence[str]) -> None:
    """Import modules in their order, so that the components that they define are registered.

    Raises:
        ConfigError: If one cannot be imported, for whatever reason.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"plugins: cannot import {module!r} ({one_line(error)}); is its folder on PYTHONPATH?"
            ) from error
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:  # a module may do anything
            raise ConfigError(
                f"plugins: {module!r} fails while it is imported ({type(error).__name__}: {one_line(error)}); "
                "correct the module"
            ) from error


def _module_names(plugins: Any, where: str) -> list[str]:
    if not isinstance(plugins, list) or not all(isinstance(module, str) for module in plugins):
        raise ConfigError(f"{where} must be a list of module names like [my_rule], got {one_line(repr(plugins), 80)}")
    for module in plugins:
        if not _MODULE.fullmatch(module):
            raise ConfigError(
                f"{where}: {one_line(repr(module), 80)} is not a module's name; write it as after `import`, without "
                "folder and .py"
            )
        if module.split(".")[0] in sys.stdlib_module_names:
            raise ConfigError(f"{where}: {module!r} is a module of Python itself; give your module another name")
    return plugins
