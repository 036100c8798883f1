"""audio_metrics.json: distances of sets of sounds as audioldm_eval computes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from golden_adapters.cases import Case, agree

from polyalign.core.errors import UserError
from polyalign.evaluation.audio.metrics import (
    inception_score,
    kernel_distance_of_subsets,
    kl_sigmoid,
    kl_softmax,
    paired_names,
)
from polyalign.evaluation.distribution import frechet_distance


def method_of(content: dict) -> str:
    return content["params"]["metric"]


def _frechet(case: Case) -> None:
    first, second = (np.array(case.inputs[name]) for name in ("features_1", "features_2"))
    ranks = [np.linalg.matrix_rank(side - side.mean(0)) for side in (first, second)]
    singular = min(ranks) < first.shape[1]  # the original's matrix root is good to 1e-5 there
    found = frechet_distance(first, second)
    for name in ("frechet_distance", "frechet_audio_distance"):
        agree(name, found, case.outputs[name], rtol=1e-9, atol=1e-5 if singular else 1e-9)


def _inception(case: Case) -> None:
    params = case.params
    mean, deviation = inception_score(
        np.array(case.inputs["logits"]),
        splits=params["splits"],
        shuffle=params["samples_shuffle"],
        seed=params["rng_seed"],
    )
    agree("mean", mean, case.outputs["inception_score_mean"])
    agree("deviation", deviation, case.outputs["inception_score_std"], atol=1e-9)


def _kl(case: Case) -> None:
    inputs, outputs = case.inputs, case.outputs
    if not case.params["same_name"]:  # the original returns -1 for what cannot be paired; ours refuses it
        assert outputs["kullback_leibler_divergence_softmax"] == outputs["kullback_leibler_divergence_sigmoid"] == -1
        others = [f"other_{name}" for name in inputs["files_1"]]
        with pytest.raises(UserError, match="share"):
            paired_names(inputs["files_2"], others)
        return
    pairs, _ = paired_names(inputs["files_2"], inputs["files_1"], least=0.0)
    assert [inputs["files_1"][place] for _, place in pairs] == outputs["paths_1"]
    reference = np.array(inputs["logits_2"])[[place for place, _ in pairs]]
    generated = np.array(inputs["logits_1"])[[place for _, place in pairs]]
    softmax, sigmoid = kl_softmax(reference, generated), kl_sigmoid(reference, generated)
    agree("softmax", softmax.mean(), outputs["kullback_leibler_divergence_softmax"], rtol=1e-6, atol=1e-9)
    agree("sigmoid", sigmoid.mean(), outputs["kullback_leibler_divergence_sigmoid"], rtol=1e-6, atol=1e-9)
    classes = reference.shape[1]
    each = sigmoid if np.isclose(sigmoid.mean() / classes, np.sum(outputs["kl_ref"])) else softmax
    each = np.sort(each / classes / len(pairs))  # the original lists them in either folder's order
    agree("each", each, np.sort(outputs["kl_ref"]).tolist(), rtol=1e-6, atol=1e-9)


def _kid(case: Case) -> None:
    params = case.params
    assert (params["degree"], params["gamma"], params["coef0"]) == (3, None, 1)
    mean, deviation = kernel_distance_of_subsets(
        np.array(case.inputs["features_2"]),
        np.array(case.inputs["features_1"]),
        subsets=params["subsets"],
        size=params["subset_size"],
        seed=params["rng_seed"],
    )
    agree("mean", mean, case.outputs["kernel_inception_distance_mean"])
    agree("deviation", deviation, case.outputs["kernel_inception_distance_std"])


METHODS: dict[str, Callable[[Case], None]] = {"frechet": _frechet, "isc": _inception, "kl": _kl, "kid": _kid}
NOT_IN_PLACE: dict[str, str] = {}
