"""ROUGE, distinct-n, BERTScore and facts: values worked out by hand, brute force, and identities."""

import json
import random
from decimal import Decimal
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from polyalign.core.errors import UserError
from polyalign.datasets.clinical.stay import prompt_of
from polyalign.datasets.worlds import clinical
from polyalign.evaluation.judges import JUDGES
from polyalign.evaluation.text_metrics.distinct import adjusted_distinct, distinct, profile
from polyalign.evaluation.text_metrics.extraction import Fact, Lexicon, facts_in
from polyalign.evaluation.text_metrics.facts import ClinicalFactsJudge, compare, read_lexicon, totals
from polyalign.evaluation.text_metrics.rouge import RougeLJudge, lcs_length, lcs_places, rouge_l, rouge_lsum, rouge_n, words
from polyalign.evaluation.text_metrics.similarity import BertSimilarityJudge, Encoder, Idf, greedy_match
from polyalign.evaluation.text_metrics.units import unit_of

torch.set_num_threads(1)
WORLD = {
    "drug": {name: [] for name in clinical.DRUGS},
    "lab": {name: [] for name in clinical.LABS},
    "diagnosis": {name: [] for name in clinical.DIAGNOSES},
    "procedure": {name: [] for name in clinical.PROCEDURES},
}


# --- ROUGE -------------------------------------------------------------------------------------------------------------------


def test_rouge_of_lins_examples():
    """Section 3.1 of the paper: two candidates of the same ROUGE-2, of which ROUGE-L sees that one has the order right."""
    reference = "police killed the gunman"
    assert rouge_n("police kill the gunman", reference, 2) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert rouge_n("the gunman kill police", reference, 2) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert rouge_l("police kill the gunman", reference) == pytest.approx((3 / 4, 3 / 4, 3 / 4))
    assert rouge_l("the gunman kill police", reference) == pytest.approx((2 / 4, 2 / 4, 2 / 4))


def test_summary_level_rouge_takes_the_union():
    """Section 3.2: w1 w2 and w1 w3 w5 of the two sentences together are four of the reference's five words."""
    found = rouge_lsum("w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5")
    assert found == pytest.approx((4 / 10, 4 / 5, 8 / 15))
    assert rouge_lsum("a b. c d.", "c d. a b.", split="sentences").f1 == 1
    assert rouge_lsum("a b. c d.", "c d. a b.").f1 == pytest.approx(rouge_l("a b. c d.", "c d. a b.").f1) == 0.5
    assert rouge_lsum("a", "a\na") == pytest.approx((1, 1 / 2, 2 / 3))  # a word counts no more often than the candidate has it


def test_rouge_n_counts_what_both_have():
    assert rouge_n("the the the cat", "the cat the mat", 1) == pytest.approx((3 / 4, 3 / 4, 3 / 4))
    assert rouge_n("a b c", "a b d e", 1) == pytest.approx((2 / 3, 2 / 4, 4 / 7))
    assert rouge_n("a b c", "a b d e", 2) == pytest.approx((1 / 2, 1 / 3, 2 / 5))
    assert rouge_n("a", "a", 2) == (0, 0, 0)


def test_words():
    assert words("Sodium 1.4 mmol/L, étage_2 10^9") == ["sodium", "1", "4", "mmol", "l", "étage", "2", "10", "9"]
    assert rouge_l("", "a") == rouge_l("...", "...") == (0, 0, 0)


def brute_lcs(first: str, second: str) -> int:
    """The longest of all subsequences of ``first`` that is one of ``second``."""

    def within(part: tuple[str, ...]) -> bool:
        rest = iter(second)
        return all(letter in rest for letter in part)

    return max(size for size in range(len(first) + 1) if any(within(part) for part in combinations(first, size)))


@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_lcs_against_all_subsequences(first, second):
    length = brute_lcs(first, second)
    assert lcs_length(first, second) == length
    places = sorted(lcs_places(first, second))
    assert len(places) == length
    rest = iter(second)
    assert all(first[place] in rest for place in places)


def reference_places(first: list[str], second: list[str]) -> set[int]:
    """Backtracking through the plain table, with the choice that the docstring of rouge_lsum states."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    i, j, places = len(first), len(second), set()
    while i and j:
        if first[i - 1] == second[j - 1]:
            places.add(i - 1)
            i, j = i - 1, j - 1
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places


def test_lcs_of_long_texts_against_the_plain_table():
    rng = random.Random(0)
    for _ in range(30):
        first, second = ([rng.choice("abcdefgh") for _ in range(rng.randint(1, 90))] for _ in range(2))
        assert lcs_places(first, second) == reference_places(first, second)


@given(st.text("ab ,.1\n", max_size=30))
def test_identity(text):
    same = 1.0 if words(text) else 0.0
    assert rouge_l(text, text).f1 == rouge_n(text, text, 1).f1 == rouge_lsum(text, text).f1 == same
    findings = compare(text, text)
    assert (findings.f1, findings.errors) == (1, 0)


def test_rouge_judge():
    conditions = [{"prompt": "x", "reference": "a b c d"}, {"prompt": "x", "reference": ["q", "a b"]}]
    assert RougeLJudge().score(conditions, ["a b", "a b"]) == pytest.approx([2 / 3, 1])
    assert RougeLJudge(measure="recall").score(conditions, ["a b", "a b c"]) == pytest.approx([1 / 2, 1])
    assert RougeLJudge(summary=True).score([{"prompt": "x", "reference": "c d. a b."}], ["a b. c d."]) == [1]
    with pytest.raises(UserError, match="compares with the text under 'reference' beside the prompt, and found nothing"):
        RougeLJudge().score([{"prompt": "x"}], ["a"])
    with pytest.raises(UserError, match="allowed: f1, precision, recall"):
        RougeLJudge(measure="f2")
    assert RougeLJudge().version != RougeLJudge(summary=True).version


# --- distinct-n --------------------------------------------------------------------------------------------------------------


def test_distinct_by_hand():
    texts = ["a b a", "a b"]  # unigrams a b a a b, bigrams ab ba ab
    assert distinct(texts, 1) == pytest.approx(2 / 5)
    assert distinct(texts, 2) == pytest.approx(2 / 3)
    assert distinct(texts, 3) == 1
    assert distinct(texts, 4) == distinct([], 1) == 0
    # five draws out of four words: 4 (1 - 0.75^5) = 3.05078125 different ones; three out of sixteen pairs: 16 (1 - (15/16)^3)
    assert adjusted_distinct(texts, 1, 4) == pytest.approx(2 / 3.05078125)
    assert adjusted_distinct(texts, 2, 4) == pytest.approx(2 / (16 * (1 - (15 / 16) ** 3)))
    assert adjusted_distinct(["a a"], 1, 1) == 1
    assert list(profile(texts, vocabulary=4)) == [f"{kind}_{n}" for kind in ("distinct", "adjusted") for n in range(1, 6)]
    with pytest.raises(ValueError, match="2 different words, more than the vocabulary of 1"):
        adjusted_distinct(texts, 1, 1)


def test_adjusted_distinct_does_not_fall_with_length():
    """Uniform draws of V words: plain distinct falls with the length, the adjusted one stays at 1."""
    rng = random.Random(1)
    short, long = (" ".join(f"w{rng.randrange(50)}" for _ in range(length)) for length in (50, 2000))
    assert distinct([short], 1) > 0.5 > 0.05 > distinct([long], 1)
    assert adjusted_distinct([short], 1, 50) == pytest.approx(1, abs=0.12)
    assert adjusted_distinct([long], 1, 50) == pytest.approx(1, abs=0.01)
    assert adjusted_distinct([long], 5, 50_000) == pytest.approx(distinct([long], 5), rel=1e-9)


# --- facts -------------------------------------------------------------------------------------------------------------------


def found(text: str, lexicon: Lexicon | None = None) -> list[tuple[str, object, str]]:
    return [(fact.kind, fact.value, fact.about) for fact in facts_in(text, lexicon or Lexicon(WORLD))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Started on 5 mg warfarin and 25 mg metoprolol", [("warfarin", "0.005"), ("metoprolol", "0.025")]),
        ("warfarin 5 mg, metoprolol 25 mg", [("warfarin", "0.005"), ("metoprolol", "0.025")]),
        ("sodium 128 and potassium 5.90", [("sodium", "128"), ("potassium", "5.9")]),
        ("sodium fell from 150 to 128 mmol/L", [("sodium", "150"), ("sodium", "0.128")]),
        ("platelets 12 K/uL; sodium of 1,280", [("platelets", "1.2E+10"), ("sodium", "1280")]),
        ("a 67-year-old woman; man, 67 years, aged; 67 yo", [("age", "67")]),
        ("calcium -2 and lactate .5; B12 was 3", [("calcium", "-2"), ("lactate", "0.5"), ("b12", "3")]),
    ],
)
def test_numbers_and_what_they_are_about(text, expected):
    numbers = [(about, value) for kind, value, about in found(text) if kind == "number"]
    assert numbers == [(about, Decimal(value)) for about, value in expected]


@pytest.mark.parametrize(
    "written", ["2134-03-05", "2134/3/5", "3/5/2134", "5 March 2134", "March 5th, 2134", "5 Mar. 2134", "[**2134-3-5**]"]
)
def test_dates_in_every_form(written):
    assert found(f"She was admitted on {written}.") == [("date", "2134-03-05", "admission")]


NOTE = """Mr. X is a 67 year old man with a 3 year history of diabetes who was admitted on [**2134-3-5**] with
pneumonia. His sodium was 128 on admission and rose to
135 by day 4. He received 2 units of PRBC, ceftriaxone 1g IV and metoprolol 25 mg
for heart
failure. BP 120/80. No evidence of stroke.
Heart
Failure"""


def test_a_note_of_wrapped_lines():
    told = [(fact.kind, fact.about or fact.value, fact.text) for fact in facts_in(NOTE, Lexicon(WORLD))]
    assert told == [
        ("number", "age", "67 year old"),
        ("number", "diabetes", "3 year"),
        ("diagnosis", "diabetes", "diabetes"),
        ("date", "admission", "2134-3-5"),
        ("diagnosis", "pneumonia", "pneumonia"),
        ("lab", "sodium", "sodium"),
        ("number", "sodium", "128"),
        (
            "number",
            Decimal(135),
            "135",
        ),  # about nothing on its line: a line that begins with a figure is taken for an entry of a list
        ("day", 4, "day 4"),
        ("number", "prbc", "2 units"),
        ("drug", "ceftriaxone", "ceftriaxone"),
        ("number", "ceftriaxone", "1g"),
        ("drug", "metoprolol", "metoprolol"),
        ("number", "metoprolol", "25 mg"),
        ("diagnosis", "heart failure", "heart\nfailure"),
        ("number", "bp", "120/80"),
        ("diagnosis", "stroke", "stroke"),
    ]


def test_no_such_date_is_no_fact():
    assert found("admitted 2134-13-40 at 25:00") == []
    assert found("died 2134-03-05 at 8:30 pm") == [("date", "2134-03-05", "death"), ("time", "20:30", "death")]


def test_names_are_found_in_any_wording_and_the_longest_counts():
    lexicon = Lexicon({"drug": {"warfarin": ["Coumadin"]}, "diagnosis": {"heart failure": ["CHF"], "failure": []}})
    assert found("COUMADIN for Heart  failure, then chf", lexicon) == [
        ("drug", "warfarin", ""),
        ("diagnosis", "heart failure", ""),
    ]
    assert found("warfarins", lexicon) == found("heart. Nothing", lexicon) == []
    with pytest.raises(ValueError, match="'--' is no name"):
        Lexicon({"drug": {"--": []}})


@pytest.mark.parametrize(
    ("text", "denied"),
    [
        ("No evidence of sepsis", True),
        ("Sepsis was ruled out", True),
        ("We ruled out sepsis", True),
        ("Cultures negative for sepsis", True),
        ("No fever but sepsis", False),
        ("No fever. Sepsis", False),
        ("Not well since Monday, and on Tuesday he had sepsis", False),
    ],
)
def test_denials(text, denied):
    assert [fact.denied for fact in facts_in(text, Lexicon(WORLD)) if fact.kind == "diagnosis"] == [denied]


def test_units():
    assert unit_of("mg") == ("mass", Decimal("0.001"))
    assert unit_of("mg/dL") == ("mass/volume", Decimal("0.01"))
    assert unit_of("g/L") == ("mass/volume", 1)
    assert unit_of("K/uL") == ("count/volume", Decimal(10) ** 9) == unit_of("10^9/L")
    assert unit_of("μg") == unit_of("mcg")
    assert unit_of("k") is unit_of("mg/xyz") is unit_of("") is None


def test_an_altered_number_is_one_error():
    source = "day 1: sodium 128 mmol/L, low.\nday 2: warfarin 5 mg.\ndiagnosis stroke."
    findings = compare(source, "On day 1 sodium was 182 mmol/L. On day 2, warfarin 5 mg. Stroke.", lexicon=Lexicon(WORLD))
    assert [(before.text, after.text) for before, after in findings.altered] == [("128 mmol/L", "182 mmol/L")]
    assert findings.counts() == {"required": 7, "told": 7, "kept": 6, "omitted": 0, "invented": 0, "altered": 1}
    assert (findings.precision, findings.recall, findings.f1) == pytest.approx((6 / 7, 6 / 7, 6 / 7))
    assert findings.by_kind()["number"] == {"required": 2, "told": 2, "kept": 1, "omitted": 0, "invented": 0, "altered": 1}


def test_omitted_and_invented():
    source = "sodium 128 mmol/L. warfarin 5 mg."
    findings = compare(source, "sodium 128 mmol/L. heparin 5000 units.", lexicon=Lexicon(WORLD))
    assert [fact.text for fact in findings.omitted] == ["warfarin", "5 mg"]
    assert [fact.text for fact in findings.invented] == ["heparin", "5000 units"]
    assert (findings.altered, findings.f1) == ((), 0.5)
    extra = compare(source, f"{source} Later sodium 140.", lexicon=Lexicon(WORLD))
    assert [fact.text for fact in extra.invented] == ["140"]  # the value of the source is told too, so this one alters nothing
    assert (extra.recall, extra.precision) == (1, 4 / 5)


def test_the_same_value_in_other_units_is_kept():
    lexicon = Lexicon(WORLD)
    assert compare("ceftriaxone 0.5 g", "ceftriaxone 500 mg", lexicon=lexicon).errors == 0
    assert compare("ceftriaxone 0.50 g", "ceftriaxone .5", lexicon=lexicon).errors == 0
    assert len(compare("ceftriaxone 1 g", "ceftriaxone 1 mg", lexicon=lexicon).altered) == 1
    assert len(compare("heparin 5000 units", "heparin 5000 mg", lexicon=lexicon).altered) == 1


def test_values_that_change_places_are_altered_where_the_names_are_known():
    source, swapped = "sodium 128. calcium 9.", "sodium 9. calcium 128."
    assert len(compare(source, swapped, lexicon=Lexicon(WORLD)).altered) == 2
    assert compare(source, swapped).errors == 0  # without a lexicon a value is looked for anywhere, which is said in the module


def test_totals_of_several_summaries():
    """4 facts told of 4 required, one altered; 2 of 4 and nothing else: 5 of 8 kept, 5 of 6 supported."""
    source = "sodium 128. warfarin 5 mg."
    several = [compare(source, text, lexicon=Lexicon(WORLD)) for text in ("sodium 182. warfarin 5 mg.", "warfarin 5 mg.")]
    found = totals(several)
    assert found == {
        "summaries": 2,
        "without_errors": 0,
        **{"required": 8, "told": 6, "kept": 5, "omitted": 2, "invented": 0, "altered": 1},
        **{"precision": pytest.approx(5 / 6), "recall": pytest.approx(5 / 8), "f1": pytest.approx(5 / 7)},
    }
    assert totals([])["f1"] == 1


def test_denial_alters_a_name():
    findings = compare("diagnosis sepsis", "no sepsis", lexicon=Lexicon(WORLD))
    assert (len(findings.altered), findings.omitted, findings.invented) == (1, (), ())


def test_reference_says_what_is_required():
    source, reference = "sodium 128. warfarin 5 mg. stroke.", "sodium 128. Gout."
    findings = compare(source, "sodium 128. warfarin 5 mg. gout.", reference=reference, lexicon=Lexicon(WORLD))
    assert (findings.recall, findings.precision, findings.errors) == (1, 1, 0)
    assert [fact.value for fact in compare(source, "sodium 128.", reference=reference, lexicon=Lexicon(WORLD)).omitted] == [
        "gout"
    ]


def test_agrees_with_the_exact_judge_of_the_world():
    """Right summaries have no error; in noisy ones the same kinds of errors are found that the exact judge finds."""
    rng, lexicon = random.Random(5), Lexicon(WORLD)
    seen = set()
    for stay in clinical.stays("heldout", 300, seed=2):
        assert compare(prompt_of(stay), clinical.summary_of(stay), lexicon=lexicon).errors == 0
        noisy = clinical.noisy_summary(stay, rng)
        exact, findings = clinical.compare(stay, noisy), compare(prompt_of(stay), noisy, lexicon=lexicon)
        expected = (exact.altered > 0, exact.omitted > 0, exact.invented > 0)
        assert (bool(findings.altered), bool(findings.omitted), bool(findings.invented)) == expected, noisy
        seen.add(expected)
    assert {(True, False, False), (False, True, False), (False, False, True), (False, False, False)} <= seen


def test_facts_judge(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"drug": {"warfarin": ["coumadin"]}, "diagnosis": ["stroke"]}))
    condition = {"prompt": "In 3 sentences: warfarin 5 mg", "source": "warfarin 5 mg. stroke", "reference": "stroke"}
    judge = ClinicalFactsJudge(lexicon=str(path))
    assert judge.score([condition] * 3, ["Coumadin 5 mg, stroke", "Coumadin 5 mg", ""]) == pytest.approx([1, 0.8, 0])
    assert judge.local_files() == [path] and "names.json@sha256:" in judge.version
    assert ClinicalFactsJudge(lexicon=str(path), measure="errors").score([condition], ["warfarin 6 mg"]) == [-2]
    assert ClinicalFactsJudge(lexicon=str(path), required="reference").score([condition], ["stroke"]) == [1]
    assert ClinicalFactsJudge().score([{"prompt": "sodium 5"}], ["sodium 6"]) == [0]


@pytest.mark.parametrize("content", ["[]", '{"drug": 1}', '{"drug": {"a": "b"}}', '{"number": ["a"]}', "{"])
def test_bad_lexicon(tmp_path, content):
    path = tmp_path / "names.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"names\.json: a lexicon is"):
        read_lexicon(path)
    with pytest.raises(UserError, match="there is no such file"):
        ClinicalFactsJudge(lexicon=str(tmp_path / "other.json"))


def test_facts_compare_by_what_they_say():
    assert Fact("number", Decimal("5.90"), "sodium", raw=1) == Fact("number", Decimal("5.9"), "sodium", raw=2)


# --- BERTScore ---------------------------------------------------------------------------------------------------------------


def test_greedy_matching_by_hand():
    """Candidate x, y against reference x, (x + y) / sqrt 2: the best of x is 1, of y 0.7071; the other way too."""
    half = 2**-0.5
    candidate, reference = torch.tensor([[2.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [3, 3]])
    one = torch.ones(2)
    mean = (1 + half) / 2
    assert greedy_match(candidate, reference, one, one) == pytest.approx((mean, mean, mean))
    weighted = greedy_match(candidate, reference, torch.tensor([1.0, 3]), torch.tensor([1.0, 0]))
    precision = (1 + 3 * half) / 4
    assert weighted == pytest.approx((precision, 1, 2 * precision / (1 + precision)))
    assert greedy_match(candidate, reference, torch.zeros(2), one) == (0, 0, 0)


def test_idf_by_hand():
    idf = Idf.of([[1, 2, 2], [1, 3], [1]])
    log = torch.log
    four = torch.tensor(4.0)
    assert torch.allclose(idf([1, 2, 9]), torch.stack([log(four / 4), log(four / 2), log(four)]))


def encoder_folder(folder: Path, kind: str = "bert", positions: int = 16) -> Path:
    """A tiny encoder with random weights and a tokenizer of whole words."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "sodium", "was", "low", "high", "pneumonia", "the", "at", "a"]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": len(names),
    }
    torch.manual_seed(0)
    if kind == "bert":
        BertModel(BertConfig(**sizes, max_position_embeddings=positions)).save_pretrained(folder)
    else:
        RobertaModel(RobertaConfig(**sizes, max_position_embeddings=positions, pad_token_id=0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("bert") / "tiny-bert")


def test_similarity_judge(bert, tmp_path):
    judge = BertSimilarityJudge(model=str(bert), batch_size=2)
    reference = "sodium was low"
    conditions = [{"prompt": "x", "reference": given} for given in (reference, ["the", reference], reference, reference)]
    same, several, other, empty = judge.score(conditions, [reference, reference, "pneumonia at the", ""])
    assert same == pytest.approx(1) and several == pytest.approx(1) and empty == 0 and -1 <= other < 0.999
    assert judge.version.startswith("1 tiny-bert@sha256:") and "layer -1 f1" in judge.version
    assert bert / "model.safetensors" in judge.local_files()
    alone = BertSimilarityJudge(model=str(bert), batch_size=1).score(conditions[2:3], ["pneumonia at the"])
    assert alone == pytest.approx([other], abs=1e-5)  # padding and company change nothing
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"reference": "the sodium"}\n{"reference": "the"}\n')
    weighted = BertSimilarityJudge(model=str(bert), idf=str(documents))
    assert (
        weighted.idf is not None
        and weighted.idf([9]).item() == pytest.approx(0)
        and "documents.jsonl@sha256:" in weighted.version
    )
    # "the" is in every document and weighs nothing: only sodium is asked for
    assert weighted.score([{"prompt": "x", "reference": "sodium the"}], ["sodium the"]) == pytest.approx([1])


def test_vectors_are_the_networks_own_and_long_texts_come_in_windows(bert):
    encoder = Encoder(bert, layer=1)
    assert (encoder.before, encoder.after, encoder.window) == ([2], [3], 14)
    ids = encoder.ids("sodium was low at the " * 6)  # 30 tokens: windows of 14, 14 and 2
    long, short = encoder.vectors([ids, ids[:14]])
    assert long.shape == (30, 16) and torch.allclose(long[:14], short, atol=1e-5)
    hidden = encoder.network(input_ids=torch.tensor([[2, *ids[28:], 3]]), output_hidden_states=True).hidden_states[1]
    assert torch.allclose(long[28:], hidden[0, 1:-1], atol=1e-5)
    assert encoder.vectors([[]])[0].shape == (0, 16)


def test_roberta_has_fewer_positions_than_its_table(tmp_path):
    encoder = Encoder(encoder_folder(tmp_path / "roberta", "roberta", positions=18))
    assert encoder.window == 18 - 1 - 2
    assert encoder.vectors([encoder.ids("sodium was low " * 20)])[0].shape == (60, 16)


def test_bad_encoders(bert, tmp_path):
    with pytest.raises(UserError, match="layer is 3; the encoder in .* has 2 layers"):
        Encoder(bert, layer=3)
    with pytest.raises(UserError, match="it needs the folder of an encoder on this machine"):
        BertSimilarityJudge(model="owner/name")
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        BertSimilarityJudge(model=str(tmp_path)).score([{"prompt": "x", "reference": "a"}], ["a"])
    broken = tmp_path / "documents.jsonl"
    broken.write_text('{"other": 1}\n')
    with pytest.raises(UserError, match="entry 1 has no text under 'reference'"):
        BertSimilarityJudge(model=str(bert), idf=str(broken)).score([{"prompt": "x", "reference": "a"}], ["a"])


def test_the_judges_are_in_the_table():
    assert {"clinical_facts", "rouge_l", "bert_similarity"} <= set(JUDGES)
