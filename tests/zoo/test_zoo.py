"""The failure zoo: seven runs that go wrong in a known way and three that do not, for a denoising model and for text."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import zoo_denoising  # noqa: E402  # pyright: ignore[reportMissingImports]
import zoo_text  # noqa: E402  # pyright: ignore[reportMissingImports]
from zoo_runs import BAD, HEALTHY, Kind, run_case  # noqa: E402  # pyright: ignore[reportMissingImports]

from polyalign.evaluation.diagnose import Diagnosis, diagnose

MODALITIES = ("denoising", "text")


@cache
def kind(modality: str) -> Kind:
    if modality == "text":
        return Kind(zoo_text, zoo_text.WordsAdapter(zoo_text.trained_base()), zoo_text.WordsJudge(), len)
    adapter = zoo_denoising.SpotsAdapter(zoo_denoising.trained_base())
    return Kind(zoo_denoising, adapter, zoo_denoising.SpotsJudge(), zoo_denoising.ink)


@pytest.fixture(scope="session")
def diagnosed(tmp_path_factory: pytest.TempPathFactory):
    """The diagnosis of a case; each is run once."""
    folder = tmp_path_factory.mktemp("zoo")

    @cache
    def of(modality: str, case: str) -> Diagnosis:
        return diagnose(run_case(kind(modality), case, folder / modality / case.replace(" ", "-")))

    return of


@pytest.mark.parametrize("modality", MODALITIES)
def test_healthy_runs_raise_no_alarm(diagnosed, modality: str) -> None:
    for case in HEALTHY:
        found = diagnosed(modality, case)
        assert (found.state, found.cause) == ("improved", None), (case, found.findings)


@pytest.mark.parametrize("modality", MODALITIES)
def test_at_least_six_of_seven_causes_are_named(diagnosed, modality: str) -> None:
    named = {case: diagnosed(modality, case).cause for case in BAD}
    wrong = {case: cause for case, cause in named.items() if cause not in BAD[case]}
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize("modality", MODALITIES)
def test_runs_whose_outputs_are_worse_are_never_called_improved(diagnosed, modality: str) -> None:
    for case in ("labels flipped", "learning rate x10", "failures only"):
        found = diagnosed(modality, case)
        assert found.state != "improved", case


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_finding_has_its_numbers_its_rule_and_its_cure(diagnosed, modality: str) -> None:
    for case in BAD:
        for finding in diagnosed(modality, case).findings:
            assert (
                finding.cure and any(sign.isdigit() for sign in finding.found) and any(sign.isdigit() for sign in finding.rule)
            )
