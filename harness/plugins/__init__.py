"""Plug-ins: code of yours that adds to what a configuration can name. One registration function a kind.

A plug-in is a module with a function `register()`, which calls the functions of this package. It is installed with an
entry point of group `triptych.plugins`, or named by the key `plugins`. README.md has an example of each kind.
"""

from harness.config.cache import register_cache_policy
from harness.config.engines import register_engine
from harness.config.kinds import register_guidance, register_metric, register_stage
from harness.config.serve import register_request_policy
from harness.plugins.load import Plugin, full_name, load_plugins, load_sources, loaded, unload_plugin
from harness.plugins.options import arguments_of, options_of, own_options
from models.registry import Architecture, register_architecture, register_attention_backend
from schedulers.options import group, option
from schedulers.tables import register_path, register_solver, register_spacing

__all__ = [
    "Architecture",
    "Plugin",
    "arguments_of",
    "full_name",
    "group",
    "load_plugins",
    "load_sources",
    "loaded",
    "option",
    "options_of",
    "own_options",
    "register_architecture",
    "register_attention_backend",
    "register_cache_policy",
    "register_engine",
    "register_guidance",
    "register_metric",
    "register_path",
    "register_request_policy",
    "register_solver",
    "register_spacing",
    "register_stage",
    "unload_plugin",
]
