"""BLEU, ROUGE-L and CIDEr by hand; the golden vector of CIDEr-D is in tests/golden (mcm_dpo)."""

from __future__ import annotations

import json
import math
import sys

import pytest

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm import captioning, ptb
from polyalign.evaluation.vlm.cider import cider


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's dog doesn't bark, it\u2019s asleep.", "a man 's dog does n't bark it 's asleep"),
        ('He cannot see "two" (small) cats...', "he can not see two small cats"),
        ("A black-and-white U.S. flag - 3.5 miles; 1,000 people!", "a black-and-white u.s. flag 3.5 miles 1,000 people"),
        ("$5 & 10%", "$ 5 & 10 %"),
        ("", ""),
    ],
)
def test_words_as_the_penn_treebank_has_them(text, words):
    assert ptb.tokens(text) == words.split()


def _read(folder, references):
    lines = [json.dumps({"image": image, "references": texts}) + "\n" for image, texts in references.items()]
    (folder / "references.jsonl").write_text("".join(lines))
    return captioning.read(folder)


def _values(scores):
    return {name: one.value for name, one in scores.groups["all"].items()}


def test_bleu_and_rouge_by_hand(tmp_path):
    sheet = _read(tmp_path, {"1": ["the cat sat on the mat", "a cat was on the mat today"], "2": ["two dogs"]})
    found = _values(captioning.score(sheet, {"1": "the cat on the mat", "2": "two dogs"}))
    # unigrams 5 + 2 of 7; bigrams (the cat, on the, the mat) 3 + 1 of 5; trigrams (on the mat) 1 of 3; no 4-gram of 2
    brevity = math.exp(1 - 8 / 7)  # lengths 5 + 2 against the closest references' 6 + 2
    assert found["bleu_1"] == pytest.approx(brevity)
    assert found["bleu_2"] == pytest.approx(brevity * math.sqrt(4 / 5))
    assert found["bleu_3"] == pytest.approx(brevity * (4 / 5 * 1 / 3) ** (1 / 3))
    assert found["bleu_4"] == 0.0
    # all 5 words in order in the first reference of 6: P = 1, R = 5/6
    first = (1 + 1.44) * (5 / 6) / (5 / 6 + 1.44)
    assert found["rouge_l"] == pytest.approx((first + 1) / 2)


def test_bleu_clips_repeated_words(tmp_path):
    sheet = _read(tmp_path, {"1": ["the cat", "the the dog"], "2": ["a"]})
    found = _values(captioning.score(sheet, {"1": "the the the the", "2": "a"}))
    assert found["bleu_1"] == pytest.approx(3 / 5)  # "the" twice in one reference, and "a"


def test_cider_by_hand():
    references = [[["a", "dog"]], [["a", "cat"]]]
    # "a" is in both images and weighs 0; "dog" weighs log 2 in both texts: cosine 1 for words, and 1 for the one bigram
    assert cider([["a", "dog"], ["a", "cat"]], references).plain == pytest.approx([5.0, 5.0])
    # of "dog" and "bird" (in no reference: log 2 too) only the first is shared: cosine 1 / sqrt 2; no bigram in common
    assert cider([["dog", "bird"], ["a"]], references).plain == pytest.approx([10 / 4 / math.sqrt(2), 0.0])
    assert cider([["a", "dog"], []], references).plain == pytest.approx([5.0, 0.0])


def test_cider_d_punishes_repetition_and_length():
    references = [[["a", "dog"]], [["a", "cat"]]]
    said = ["dog", "dog"]
    scores = cider([said, ["a"]], references)
    assert scores.plain[0] == pytest.approx(10 / 4)  # as many words dog as one likes point in the same direction
    assert scores.d[0] == pytest.approx(10 / 4 / 2)  # min(2, 1) 1 / (2 1); the lengths are equal
    longer = cider([["a", "dog", "a", "a"], ["a"]], references).d[0]
    assert longer == pytest.approx(10 / 4 * (1 + 1 / math.sqrt(3)) * math.exp(-4 / 72))


def test_cider_refuses_what_has_no_reference():
    with pytest.raises(ValueError, match="every image needs a reference"):
        cider([["a"]], [[]])
    with pytest.raises(ValueError, match="2 candidates need as many lists"):
        cider([["a"], ["b"]], [[["a"]]])


def test_captions_of_coco_and_an_empty_one(tmp_path):
    annotations = [
        {"image_id": 1, "caption": "A dog."},
        {"image_id": 1, "caption": "The dog!"},
        {"image_id": 2, "caption": "A cat."},
    ]
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"annotations": annotations}))
    sheet = captioning.read(tmp_path)
    assert sheet.questions[0].truth == ("A dog.", "The dog!")
    scores = captioning.score(sheet, {"1": "a dog", "2": " "})
    assert list(scores.unread) == ["2"] and _values(scores)["rouge_l"] == 0.5
    # 5 against "a dog"; against "the dog" one of two weighted words, cosine 1 / sqrt 2, and no bigram
    assert scores.groups["all"]["cider"].interval == pytest.approx((0.0, (5 + 10 / 4 / math.sqrt(2)) / 2))
    alone = captioning.score(sheet, {"1": "a dog"})
    assert _values(alone)["cider"] == 0.0 and "CIDEr is 0 for a single image" in alone.notes[0]
    nothing = _values(captioning.score(sheet, {"1": "", "2": ""}))
    assert set(nothing.values()) == {0.0}


def test_references_are_checked(tmp_path):
    for row in ({"image": "1", "references": []}, {"image": "1", "references": [3]}, {"image": "1", "references": [" "]}):
        (tmp_path / "references.jsonl").write_text(json.dumps(row))
        with pytest.raises(UserError, match="one list of texts is expected for an image"):
            captioning.read(tmp_path)
    (tmp_path / "references.jsonl").unlink()
    (tmp_path / "captions_a.json").write_text("{}")
    with pytest.raises(UserError, match="an object with a list of annotations"):
        captioning.read(tmp_path)


def test_java_metrics_say_what_they_need(tmp_path, monkeypatch):
    sheet = _read(tmp_path, {"1": ["a dog"]})
    with pytest.raises(UserError, match="'cider' is no metric of captions; allowed with Java: meteor, spice"):
        captioning.score(sheet, {"1": "a dog"}, java=["cider"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="meteor runs a Java program, and no 'java' is on the PATH"):
        captioning.score(sheet, {"1": "a dog"}, java=["meteor"])
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\n")
    java.chmod(0o755)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(UserError, match=r"pip install 'polyalign\[bench\]'"):
        captioning.score(sheet, {"1": "a dog"}, java=["spice"])
