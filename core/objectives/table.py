"""The table of objectives: one row each, made of slots.

Everything a user reads about an objective (`polyalign explain`), everything a recipe may say about it, and how it is built
stands in its row. A new objective is one more row: a class of parameters and a :class:`Row` in the ``ROWS`` of the file of its
family (table_pairs.py and its neighbours).

Notation: r log-ratio of a candidate, h = r_w - r_l, s = phi(r), l log-likelihood, n length, e_w the winner's error (its
negative log-likelihood), sigma logistic, sg without gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, Union

from pydantic import Field, TypeAdapter

from polyalign.core.errors import UserError
from polyalign.core.objectives import (
    table_denoising,
    table_free,
    table_groups,
    table_pairs,
    table_pointwise,
    table_tokens,
    table_visual,
)
from polyalign.core.objectives.objective import Objective
from polyalign.core.objectives.rows import Parameters, PreferenceParameters, Row, preference
from polyalign.core.objectives.table_denoising import SDPO
from polyalign.core.objectives.table_pairs import DPO, IPO, SFT, HingeDPO

__all__ = [
    "DPO",
    "IPO",
    "SDPO",
    "SFT",
    "SPEC",
    "TABLE",
    "HingeDPO",
    "ObjectiveSpec",
    "Parameters",
    "PreferenceParameters",
    "Row",
    "build",
    "preference",
    "spec_type",
]

_FAMILIES = (table_pairs, table_free, table_pointwise, table_tokens, table_groups, table_visual, table_denoising)

TABLE: dict[str, Row] = {row.name: row for family in _FAMILIES for row in family.ROWS}


def spec_type(table: Mapping[str, Row]) -> Any:
    """The type of the recipe key ``objective``: the parameters of one row of ``table``, chosen by ``name``."""
    return Annotated[Union[tuple(row.parameters for row in table.values())], Field(discriminator="name")]  # noqa: UP007


if TYPE_CHECKING:
    ObjectiveSpec: TypeAlias = Parameters
else:
    ObjectiveSpec = spec_type(TABLE)

SPEC: TypeAdapter[Any] = TypeAdapter(spec_type(TABLE))
"""Checks the mapping that a recipe gives as ``objective``, for callers from Python and tests."""


def build(spec: ObjectiveSpec, table: Mapping[str, Row] = TABLE) -> Objective:
    """The objective that ``spec`` describes.

    Raises:
        UserError: a name that the table does not have, or slots that do not fit together.
    """
    name = str(getattr(spec, "name", None))
    if name not in table:
        raise UserError(f"objective {name!r} is not in the table; allowed: {', '.join(sorted(table))}")
    row = table[name]
    built = row.build(spec)  # an option may leave fewer likelihoods than the row has
    likelihoods = built.likelihoods & row.likelihoods
    return replace(built, likelihoods=likelihoods, data=row.data, moving_reference=row.moving_reference)
