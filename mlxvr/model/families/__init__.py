"""The model families: `base` says in what they may differ, and every other file here is one of them.

A file that is added is a family that is known: all of them are imported, and each registers itself. A family that lives
outside the package calls `register`.
"""

from importlib import import_module
from pkgutil import iter_modules

from mlxvr.model.families.base import FAMILIES, Family, family_of, register

__all__ = ["FAMILIES", "Family", "family_of", "register"]

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
