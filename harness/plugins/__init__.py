"""Plug-ins: code of yours that adds to what a configuration can name. One registration function a kind.

A plug-in is a module with a function `register()`, which calls the functions of this package. It is installed with an
entry point of group `triptych.plugins`, or named by the key `plugins`. README.md has an example of each kind.
"""

from harness.plugins.load import Plugin, full_name, load_plugins, load_sources, loaded
from harness.plugins.options import arguments_of, options_of
from schedulers.options import group, option
from schedulers.tables import register_path, register_solver, register_spacing

__all__ = [
    "Plugin",
    "arguments_of",
    "full_name",
    "group",
    "load_plugins",
    "load_sources",
    "loaded",
    "option",
    "options_of",
    "register_path",
    "register_solver",
    "register_spacing",
]
