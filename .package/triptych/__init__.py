"""The version of the installed distribution; the code is in the packages harness, models and schedulers."""

from harness import __version__ as __version__
