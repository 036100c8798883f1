"""Optional dependencies, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from polyalign.core.errors import UserError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` or say which extra brings it.

    Raises:
        UserError: the module is not installed, or is installed and does not import.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs the package '{module}', which does not import here ({error}). "
            f"Install it with: pip install 'polyalign[{extra}]'"
        ) from error
