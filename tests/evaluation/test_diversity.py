import numpy as np
import pytest
from PIL import Image

from polyalign.evaluation.diversity import by_prompt, compare_diversity, pairwise, thumbnails, vendi


def test_pairwise_by_hand():
    assert pairwise(np.eye(3), "cosine") == pytest.approx(1.0)
    assert pairwise(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 5.0]]), "cosine") == pytest.approx(2 / 3)
    assert pairwise(np.array([[0.0, 0.0], [3.0, 4.0]]), "rms") == pytest.approx(np.sqrt(12.5))
    assert pairwise(np.ones((4, 2)), "rms") == 0.0
    with pytest.raises(ValueError, match="1 outputs"):
        pairwise(np.ones((1, 2)), "rms")


def test_vendi_counts_different_outputs():
    assert vendi(np.eye(5)) == pytest.approx(5.0)
    assert vendi(np.ones((5, 3))) == pytest.approx(1.0)
    assert vendi(np.repeat(np.eye(3), 4, axis=0)) == pytest.approx(3.0)


def test_thumbnails_see_colour_and_not_size():
    red, large = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (64, 32), "red")
    small = thumbnails([red, large, Image.new("L", (9, 9), 0)])
    assert small.shape == (3, 16 * 16 * 3) and (small[0] == small[1]).all() and (small[2] == 0).all()
    assert pairwise(small[[0, 2]], "rms") == pytest.approx(np.sqrt(1 / 3))


def test_only_prompts_with_several_outputs_count():
    features = np.array([[0.0], [2.0], [7.0], [7.0], [1.0]])
    assert by_prompt(features, ["a", "a", "b", "b", "c"], "rms") == {"a": 2.0, "b": 0.0}
    with pytest.raises(ValueError, match="5 features for 1 prompts"):
        by_prompt(features, ["a"], "rms")


def test_a_collapse_is_seen():
    rng = np.random.default_rng(0)
    prompts = [f"prompt {index // 4}" for index in range(80)]
    base = rng.normal(size=(80, 6))
    found = compare_diversity(base, base * 0.5, prompts, metric="rms", seed=0)
    assert found["prompts"] == 20 and found["aligned"] == pytest.approx(found["base"] / 2)
    assert found["change"] == pytest.approx(-found["base"] / 2) and found["interval"][1] < 0
    same = compare_diversity(base, base, prompts, metric="cosine", seed=0)
    assert same["change"] == 0.0 and same["interval"] == [0.0, 0.0]
    assert compare_diversity(base, base, list(range(80)), metric="rms", seed=0) == {}
