"""polyalign: align generative models of every modality with preferences.

In a checkout the five parts (core, modalities, datasets, evaluation, configs) lie at the repository's root; in an installed
wheel they lie beside this file. Extending ``__path__`` makes ``polyalign.core`` and so on mean the same in both.
"""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "pyproject.toml").is_file() and (_checkout / "modalities").is_dir():
    __path__.append(str(_checkout))

from polyalign.core.compat import cpu_wheels as _cpu_wheels  # noqa: E402  (needs the path above)

_cpu_wheels.arm()
