"""Units of measurement as a dimension and a factor, so that 0.5 g and 500 mg are one dose.

Only scales of one and the same measure are converted. Not converted: mEq to mmol (it depends on the ion), mg/dL to mmol/L (on
the substance), degrees, and months to years.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

_NAMES: Mapping[str, Mapping[str, str]] = {
    "mass": {"kg": "1e3", "g gm gram grams": "1", "mg": "1e-3", "mcg ug µg": "1e-6", "ng": "1e-9", "pg": "1e-12"},
    "volume": {"l liter liters litre litres": "1", "dl": "1e-1", "ml cc": "1e-3", "ul µl": "1e-6", "fl": "1e-15"},
    "amount": {"mol": "1", "mmol": "1e-3", "umol µmol": "1e-6", "nmol": "1e-9"},
    "equivalent": {"eq": "1", "meq": "1e-3"},
    "unit": {"unit units u iu": "1"},
    "length": {"cm": "1e-2", "mm": "1e-3"},
    "time": {"min mins minute minutes": "1", "hour hours hr hrs h": "60", "day days": "1440", "week weeks": "10080"},
    "month": {"month months": "1"},
    "year": {"year years yr yrs": "1"},
    "percent": {"% percent": "1"},
    "mmhg": {"mmhg": "1"},
    "beat": {"bpm": "1"},
    "celsius": {"°c c": "1"},
    "fahrenheit": {"°f f": "1"},
    "tablet": {"tablet tablets tab tabs": "1"},
    "capsule": {"capsule capsules cap caps": "1"},
    "puff": {"puff puffs": "1"},
    "drop": {"drop drops": "1"},
}
UNITS: Mapping[str, tuple[str, Decimal]] = {
    name: (dimension, Decimal(factor))
    for dimension, scales in _NAMES.items()
    for names, factor in scales.items()
    for name in names.split()
}
_COUNTS: Mapping[str, Decimal] = {"k": Decimal(1000), "m": Decimal(10) ** 6}
"""What stands before a slash in blood counts: K/uL is a thousand in a microlitre."""
_POWER = re.compile(r"10\^(\d{1,2})")


def unit_of(text: str) -> tuple[str, Decimal] | None:
    """Dimension and factor of a unit as written: ``mg/dL`` is ("mass/volume", 0.01); None where it is no unit known here."""
    parts = text.casefold().replace("μ", "µ").split("/")
    dimensions, factor = [], Decimal(1)
    for place, part in enumerate(parts):
        found = _count(part) if place == 0 and len(parts) > 1 else None
        found = found or UNITS.get(part)
        if found is None:
            return None
        dimensions.append(found[0])
        factor = factor * found[1] if place == 0 else factor / found[1]
    return "/".join(dimensions), factor


def _count(part: str) -> tuple[str, Decimal] | None:
    if power := _POWER.fullmatch(part):
        return "count", Decimal(10) ** int(power[1])
    return ("count", _COUNTS[part]) if part in _COUNTS else None
