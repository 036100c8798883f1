"""``polyalign diagnose``: reads a run folder and says what went wrong, with the numbers, the rule and the cure.

It knows no modality: pairs are compared by content, size, scores and authors, training by log-probabilities a token or by
errors relative to the reference's. Every rule and threshold stands in the code with its reason and is the same for all runs;
where what a rule needs is missing, the answer is "not enough to say".
"""

from polyalign.evaluation.diagnose.diagnosis import Diagnosis, diagnose, write_diagnosis
from polyalign.evaluation.diagnose.findings import LIMITS, Finding
from polyalign.evaluation.diagnose.shown import as_markup, as_text

__all__ = ["LIMITS", "Diagnosis", "Finding", "as_markup", "as_text", "diagnose", "write_diagnosis"]
