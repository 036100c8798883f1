"""What an evaluation.json has to look like for the report to read it: a file may be cut, or edited by hand."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

Interval = tuple[float | None, float | None] | None


class _Rate(BaseModel):
    wins: int
    losses: int
    ties: int
    rate: float | None
    wilson: Interval = None
    bootstrap: Interval = None
    sign_test_p: float | None = None


class _Score(BaseModel):
    mean: float
    interval: Interval = None


class _Judge(BaseModel):
    name: str
    parts: list[str] | None = None
    right_from: float | None = None
    broken_below: float | None = None
    broken_word: str | None = None


class _Arm(BaseModel):
    text: str
    score: float


class _Item(BaseModel):
    prompt: str
    base_score: float
    aligned_score: float
    images: list[str] | None = None
    verdicts: dict[str, str] | None = None
    arms: dict[str, _Arm] | None = None


class _Against(BaseModel):
    difference: float
    low: float
    high: float


class _Share(BaseModel):
    of: int
    share: float
    interval: tuple[float, float]
    against_base: _Against | None = None


class _Tally(_Share):
    broken: _Share | None = None


class _View(BaseModel):
    label: str
    file: str
    remark: str


class _Clouds(BaseModel):
    name: str
    views: list[_View]


class _Mean(BaseModel):
    mean: float
    interval: tuple[float, float]


class _Change(BaseModel):
    before: float
    after: float
    difference: float
    difference_interval: tuple[float, float]
    ratio: float | None
    ratio_interval: tuple[float, float] | None


class _Changes(BaseModel):
    before: str
    after: str
    steps: dict[str, dict[str, _Change]]


class _Completions(BaseModel):
    scans: int
    places: int
    steps: list[int]
    labels: dict[str, str]
    means: dict[str, dict[str, dict[str, _Mean]]]
    changes: list[_Changes]


class _Evaluation(BaseModel):
    win_rate: _Rate
    judge: _Judge | None = None
    scores: dict[str, _Score] | None = None
    other_judges: dict[str, dict[str, Any]] | None = None
    arms: dict[str, dict[str, Any]] | None = None
    tasks: dict[str, dict[str, Any]] | None = None
    items: list[_Item] | None = None
    groups: dict[str, dict[str, dict[str, _Tally]]] | None = None
    completions: _Completions | None = None
    clouds: list[_Clouds] | None = None


def malformed(evaluation: dict[str, Any]) -> str | None:
    """Where and why ``evaluation`` is not what the evaluation stage writes, or None. Further keys are allowed."""
    try:
        _Evaluation.model_validate(evaluation)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    return None
