"""Preference objectives: one table of rows (table.py), each a filling of the same slots.

weights.py -> links.py -> offsets.py -> losses.py, with regularisers.py and safeguard.py, put together by objective.py. rows.py
says what a row is, table_*.py have the rows, family by family, and serves.py says which of them a modality can be trained with.
"""

from polyalign.core.objectives.beta import AutoBeta, Beta
from polyalign.core.objectives.objective import Objective, Outcome, Term
from polyalign.core.objectives.table import TABLE, ObjectiveSpec, Row, build, spec_type

__all__ = ["TABLE", "AutoBeta", "Beta", "Objective", "ObjectiveSpec", "Outcome", "Row", "Term", "build", "spec_type"]
