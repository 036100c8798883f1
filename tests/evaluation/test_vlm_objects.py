"""Objects in descriptions: mentions, CHAIR, and AMBER's lists."""

from __future__ import annotations

import json

import pytest

from polyalign.core.errors import UserError
from polyalign.evaluation.vlm import amber, chair
from polyalign.evaluation.vlm.mentions import Phrases
from polyalign.evaluation.vlm.vectors import Vectors

SYNONYMS = (
    "person, man, woman, child\nbird\ndog, puppy\ntrain\nairplane, jet\nchair, seat\ntoilet\nwine glass\nknife\nbus\n"
    "dining table, table\ntie, bow tie\n"
)


def _values(scores, group="all"):
    return {name: one.value for name, one in scores.groups[group].items()}


def test_plurals_are_undone_with_the_list():
    names = ("bus", "knife", "puppy", "tie", "wine glass", "man", "skis", "couch", "leaf", "mouse")
    phrases = Phrases({name: name for name in names})
    text = "Buses, knives, puppies, ties, two wine glasses, men, skis, couches, leaves and mice: no glasses, no manes."
    assert [phrase for phrase, _ in phrases.find(text)] == list(names)


def test_longest_phrase_is_taken_and_marks_part_words():
    phrases = Phrases({"table": "table", "dining table": "dining table", "hot dog": "hot dog", "dog": "dog"})
    found = [meaning for _, meaning in phrases.find("A dining table, hot dogs. It was hot, dog!")]
    assert found == ["dining table", "hot dog", "dog"]


def _chair(folder, truths, synonyms=SYNONYMS):
    (folder / "objects.json").write_text(json.dumps(truths))
    if synonyms:
        (folder / "synonyms.txt").write_text(synonyms)
    return chair.read(folder)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A baby bird and an adult dog", ["bird", "dog"]),
        ("A passenger jet over the train tracks", ["airplane"]),
        ("The seat of the toilet", ["toilet"]),
        ("Two men on seats with wine glasses", ["person", "chair", "wine glass"]),
        ("a man in a bow tie at the dining table", ["person", "tie", "dining table"]),
        ("a baby elephant", []),
    ],
)
def test_published_rules_for_mentions(tmp_path, text, found):
    sheet = _chair(tmp_path, {"1": ["dog"]})
    assert chair.mentioned(text, sheet.material.phrases()) == found


def test_chair(tmp_path):
    sheet = _chair(tmp_path, {"1": ["dog", "man"], "2": ["bus"], "3": ["knife"]})
    said = {"1": "A puppy, a dog and a bird.", "2": "Two buses.", "3": ""}
    scores = chair.score(sheet, said)
    # mentions: dog, dog, bird (wrong), bus; objects: dog, person, bus, knife, of which dog and bus are mentioned
    expected = {"chair_i": 1 / 4, "chair_s": 1 / 3, "recall": 2 / 4, "words_per_caption": 9 / 3, "mentions_per_caption": 4 / 3}
    assert _values(scores) == pytest.approx(expected)
    assert scores.counts["all"] == {"captions": 3, "mentions": 4, "wrong": 1, "covered": 2, "objects": 4}
    assert scores.groups["all"]["chair_s"].interval == (0.0, 1.0)


def test_chair_without_synonyms_looks_for_the_named_objects(tmp_path):
    sheet = _chair(tmp_path, {"a": ["red circle"], "b": ["blue square"]}, synonyms="")
    scores = chair.score(sheet, {"a": "Red circles and a blue square.", "b": "a blue square and a green square"})
    assert _values(scores)["chair_i"] == pytest.approx(1 / 3) and _values(scores)["recall"] == 1.0


def test_chair_from_coco(tmp_path):
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    instances = {
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"image_id": 7, "category_id": 1}, {"image_id": 7, "category_id": 1}],
    }
    captions = {"annotations": [{"image_id": 7, "caption": "A man with two dogs"}, {"image_id": 8, "caption": "buses"}]}
    (tmp_path / "instances_val2014.json").write_text(json.dumps(instances))
    (tmp_path / "captions_val2014.json").write_text(json.dumps(captions))
    sheet = chair.read(tmp_path)
    assert {question.id: question.truth for question in sheet.questions} == {"7": {"dog", "person"}, "8": {"bus"}}
    assert len(sheet.files) == 3
    instances["annotations"].append({"image_id": 9, "category_id": 5})
    (tmp_path / "instances_val2014.json").write_text(json.dumps(instances))
    with pytest.raises(UserError, match="annotation 2: category_id 5 is none of the file's categories"):
        chair.read(tmp_path)


def test_chair_refuses_other_folders(tmp_path):
    with pytest.raises(UserError, match=r"objects.json\(l\), or COCO's"):
        chair.read(tmp_path)
    with pytest.raises(UserError, match="1 objects are not in synonyms.txt, such as 'zebra'"):
        _chair(tmp_path, {"1": ["zebra"]})
    with pytest.raises(UserError, match="image '1': a list of names of objects is expected"):
        _chair(tmp_path, {"1": "dog"})
    with pytest.raises(UserError, match="line 2: 'puppy' is a name of 'dog' already"):
        _chair(tmp_path, {"1": ["dog"]}, "dog, puppy\nseal, puppy\n")
    (tmp_path / "objects.json").unlink()
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    (tmp_path / "objects.jsonl").write_text('{"image": "1", "objects": ["dog"]}\n{"image": 1, "objects": []}\n')
    with pytest.raises(UserError, match="an image is listed twice"):
        chair.read(tmp_path)


RELATION = {"sky": [], "person": ["man"], "man": ["person"], "dog": [], "cloud": [], "tree": ["bush"], "sea": ["water"]}


def _amber(folder, annotations, queries=None):
    (folder / "annotations.json").write_text(json.dumps(annotations))
    (folder / "relation.json").write_text(json.dumps(RELATION))
    (folder / "safe_words.txt").write_text("water\n")
    if queries:
        (folder / "query_all.json").write_text(json.dumps(queries))
    return amber.read(folder)


def test_amber_descriptions(tmp_path):
    annotations = [
        {"id": 1, "type": "generative", "truth": ["sky", "man", "person"], "hallu": ["dog", "cloud"]},
        {"id": 2, "type": "generative", "truth": ["tree"], "hallu": ["sea"]},
    ]
    sheet = _amber(tmp_path, annotations, [{"id": 1, "image": "a.jpg", "query": "Describe."}])
    scores = amber.score(sheet, {"1": "A person under the sky, dogs, water and a table.", "2": "Bushes."})
    # words: person, sky, dog (wrong), water (safe), bush; of 4 true ones man (the first that "person" stands for), sky, tree
    expected = {"chair": 1 / 5, "cover": 3 / 4, "hal": 1 / 2, "cog": 1 / 3}
    assert _values(scores, "generative") == pytest.approx(expected)
    assert any("without --vectors" in note for note in scores.notes)


def test_amber_joins_similar_words_with_vectors(tmp_path):
    annotations = [{"id": 1, "type": "generative", "truth": ["tree"], "hallu": ["sea"]}]
    sheet = _amber(tmp_path, annotations)
    (tmp_path / "vectors.txt").write_text("7 2\ntree 1 0\ndog 0.9 0.1\ncloud 0 1\nsea 0 2\nother 1 1\n")
    scores = amber.score(sheet, {"1": "a dog and a cloud"}, vectors=tmp_path / "vectors.txt")
    # the dog's vector is near the tree's (cosine 0.994), the cloud's is the sea's, a likely mistake
    assert _values(scores, "generative") == {"chair": 0.5, "cover": 1.0, "hal": 1.0, "cog": 1.0}
    exact = amber.score(sheet, {"1": "a dog and a cloud"})
    assert _values(exact, "generative") == {"chair": 1.0, "cover": 0.0, "hal": 1.0, "cog": 0.0}


def test_amber_questions_have_no_as_the_positive_class(tmp_path):
    kinds = ["hallucination", "hallucination", "attribute-state", "attribute-number", "relation"]
    truths = ["no", "no", "yes", "no", "yes"]
    rows = [
        {"id": number, "type": f"discriminative-{kind}", "truth": truth}
        for number, (kind, truth) in enumerate(zip(kinds, truths, strict=True), start=1)
    ]
    sheet = _amber(tmp_path, rows, [{"id": number, "image": "a.jpg", "query": "?"} for number in range(1, 6)])
    said = dict(zip("12345", ["No", "Yes", "No", "no, two", "Yes"], strict=True))
    scores = amber.score(sheet, said)
    # no is said 3 times, 2 of them right; 3 answers should be no
    found = _values(scores, "discriminative")
    assert found == pytest.approx({"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 2 / 5})
    assert _values(scores, "existence")["recall"] == 0.5 and _values(scores, "attribute")["accuracy"] == 0.5
    assert scores.groups["attribute/number"]["accuracy"].value == 1.0 and "overall" not in scores.groups
    assert scores.groups["discriminative"]["f1"].clusters == 1
    strict = amber.score(sheet, said, reader="amber")
    assert list(strict.unread) == ["4"] and _values(strict, "attribute/number")["accuracy"] == 0.0


def test_amber_score_joins_both(tmp_path):
    rows = [
        {"id": 1, "type": "generative", "truth": ["sky"], "hallu": []},
        {"id": 2, "type": "discriminative-relation", "truth": "no"},
    ]
    sheet = _amber(tmp_path, rows)
    scores = amber.score(sheet, {"1": "sky and dog", "2": "No"})
    assert scores.groups["overall"]["amber_score"].value == pytest.approx((1 - 0.5 + 1) / 2)
    assert scores.groups["generative"]["cog"].value is None  # nothing is listed as likely
    assert sheet.notes and "no query_*.json" in scores.notes[0]


def test_amber_refuses_other_files(tmp_path):
    with pytest.raises(UserError, match="'zebra' is not in relation.json"):
        _amber(tmp_path, [{"id": 1, "type": "generative", "truth": ["zebra"], "hallu": []}])
    with pytest.raises(UserError, match="type is 'other'; allowed: generative"):
        _amber(tmp_path, [{"id": 1, "type": "other", "truth": "yes"}])
    (tmp_path / "safe_words.txt").unlink()
    with pytest.raises(UserError, match="safe_words.txt: AMBER's safe words cannot be read"):
        amber.read(tmp_path)


def test_vectors_refuse_other_files(tmp_path):
    path = tmp_path / "vectors.txt"
    for content, said in (
        ("dog 1 2\ncat 1\n", "line 2 has 1 numbers, those before have 2"),
        ("dog one two\n", "no text file of word vectors"),
        ("cow 1 2\n", "has a vector for none of the 2 words"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            Vectors(path, {"dog", "cat"})
