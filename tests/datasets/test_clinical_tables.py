"""Tables in MIMIC-III's layout to stays, prompts and rows; and everything that can be wrong with them."""

import csv
import gzip
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from polyalign.core.errors import UserError
from polyalign.datasets.clinical import rows, write_tables
from polyalign.datasets.clinical.corruption import corrupt
from polyalign.datasets.clinical.instructions import INSTRUCTIONS, instruction_prompt, styles
from polyalign.datasets.clinical.layout import COLUMNS
from polyalign.datasets.clinical.mimic import MimicReader, _moment
from polyalign.datasets.clinical.stay import Event, prompt_of, stay_of
from polyalign.datasets.clinical.tables import Table, Tally
from polyalign.datasets.formats.text_rows import import_text_rows
from polyalign.datasets.pairs import PairStore
from polyalign.datasets.prompts import load_prompts
from polyalign.datasets.worlds import clinical
from polyalign.evaluation.text_metrics.facts import ClinicalFactsJudge

STAYS = clinical.stays("train", 40, seed=4)


@pytest.fixture
def tables(tmp_path) -> Path:
    folder = tmp_path / "tables"
    write_tables.write_tables(folder, [(stay, clinical.summary_of(stay)) for stay in STAYS])
    return folder


def read(folder: Path, **options) -> list:
    return list(MimicReader(folder, **options).records())


def edit(folder: Path, table: str, change) -> None:
    """Change a table's rows, each a dictionary, header included by their keys."""
    path = folder / f"{table}.csv"
    with open(path, newline="", encoding="utf-8") as file:
        content = list(csv.DictReader(file))
    content = change(content)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(content[0]))
        writer.writeheader()
        writer.writerows(content)


def setting(row: int, **values):
    """A change for :func:`edit`: some values of one row."""

    def change(content):
        content[row] |= values
        return content

    return change


# --- the way there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gzipped", [False, True])
def test_the_worlds_prompts_come_back_to_the_letter(tmp_path, gzipped):
    stays = clinical.stays("train", 300)
    written = write_tables.write_tables(tmp_path / "t", [(stay, clinical.summary_of(stay)) for stay in stays], gzipped=gzipped)
    assert sorted(path.name for path in written) == sorted(f"{name}.csv{'.gz' if gzipped else ''}" for name in COLUMNS)
    reader = MimicReader(tmp_path / "t", at_once=70)  # 300 admissions in five passes
    records = list(reader.records())
    assert [prompt_of(record.stay) for record in records] == [prompt_of(stay) for stay in stays]
    assert [record.stay for record in records] == stays
    assert [record.reference for record in records] == [clinical.summary_of(stay) for stay in stays]
    assert reader.tally.counts["stays"] == 300 and not reader.tally.dropped


def test_header_in_lower_case_any_order_and_byte_order_mark(tables):
    for path in list(tables.iterdir()):
        with open(path, newline="", encoding="utf-8") as file:
            content = [{key.lower(): row[key] for key in reversed(row)} for row in csv.DictReader(file)]
        path.unlink()
        with open(tables / path.name.lower(), "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(content[0]), quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(content)
    assert [record.stay for record in read(tables)] == STAYS


def test_identifiers_that_an_export_made_floats_of(tables):
    for table in ("LABEVENTS", "PRESCRIPTIONS"):
        edit(tables, table, lambda content: [row | {"HADM_ID": row["HADM_ID"] + ".0"} for row in content])
    assert [record.stay for record in read(tables)] == STAYS


def test_only_some_admissions_kinds_and_no_notes(tables):
    records = read(tables, admissions=[100003, "100001"], kinds=("diagnosis", "drug"), notes=False)
    assert [(record.hadm_id, record.reference) for record in records] == [("100001", None), ("100003", None)]
    assert {event.kind for record in records for event in record.stay.events} <= {"diagnosis", "drug"}
    for name in ("LABEVENTS", "D_LABITEMS", "NOTEEVENTS", "PROCEDURES_ICD", "D_ICD_PROCEDURES"):
        (tables / f"{name}.csv").unlink()
    assert read(tables, limit=3, kinds=("diagnosis", "drug"), notes=False)[2] == records[1]
    with pytest.raises(UserError, match="has no admission 7 "):
        read(tables, admissions=["7"], kinds=("diagnosis",), notes=False)


def test_labs_that_are_not_flagged_and_values_that_are_no_numbers(tables):
    hadm, admitted = "100001", STAYS[0].admitted.isoformat()
    own = {"SUBJECT_ID": "1", "HADM_ID": hadm, "CHARTTIME": f"{admitted} 01:00:00", "VALUEUOM": "", "VALUENUM": ""}
    extra = [
        {"VALUE": "NEG", "FLAG": ""},
        {"VALUE": " >50", "FLAG": "abnormal"},
        {"VALUE": "7.10", "FLAG": "delta"},
        {"VALUE": ""},
    ]
    edit(
        tables,
        "LABEVENTS",
        lambda content: [*content, *({**content[0], **own, "FLAG": "", "ITEMID": "9", **one} for one in extra)],
    )
    edit(tables, "D_LABITEMS", lambda content: [*content, content[0] | {"ITEMID": "9", "LABEL": "ketone", "FLUID": "Urine"}])
    reader = MimicReader(tables, labs="all")
    told = prompt_of(next(reader.records()).stay)
    for line in ("ketone (urine) NEG, normal.", "ketone (urine) >50, abnormal.", "ketone (urine) 7.10, normal."):
        assert f"day 1: {line}" in told
    list(reader.records())
    assert reader.tally.counts["lab rows without a value"] >= 1
    assert "ketone (urine) >50, abnormal" in prompt_of(read(tables)[0].stay) and "NEG" not in prompt_of(read(tables)[0].stay)


def test_without_dates_procedures_are_undated(tables):
    edit(tables, "PROCEDURES_ICD", lambda content: [{key: row[key] for key in row if key != "CHARTDATE"} for row in content])
    records = read(tables)
    with_one = next(record.stay for record, stay in zip(records, STAYS, strict=True) if stay.of_kind("procedure"))
    assert "\nundated: procedure " in prompt_of(with_one)
    assert {event.day for record in records for event in record.stay.of_kind("procedure")} == {0}
    assert stay_of(prompt_of(with_one)) == with_one


def test_what_is_outside_of_the_stay_is_left_out_and_counted(tables):
    before = len(read(tables)[0].stay.events)
    day = STAYS[0].admitted.replace(year=STAYS[0].admitted.year - 1).isoformat()
    edit(tables, "PRESCRIPTIONS", lambda content: [*content, content[0] | {"HADM_ID": "100001", "STARTDATE": day}])
    reader = MimicReader(tables)
    assert len(next(reader.records()).stay.events) == before
    assert reader.tally.counts["drug events outside of the stay"] == 1


def test_old_age_is_hidden_and_locations_are_phrases(tables):
    born = STAYS[0].admitted.year - 300
    edit(tables, "PATIENTS", setting(0, DOB=f"{born}-01-01 00:00:00"))
    edit(tables, "ADMISSIONS", setting(0, DISCHARGE_LOCATION="HOSPICE-HOME", HOSPITAL_EXPIRE_FLAG="0"))
    edit(tables, "ADMISSIONS", setting(1, DISCHARGE_LOCATION="MOON, BASE 3", HOSPITAL_EXPIRE_FLAG="0"))
    edit(tables, "ADMISSIONS", setting(2, DISCHARGE_LOCATION="", HOSPITAL_EXPIRE_FLAG="1"))
    first, second, third, *_ = read(tables)
    assert (first.stay.age, first.stay.destination) == (90, "discharged to hospice at home")
    assert (second.stay.destination, third.stay.destination) == ("discharged to moon base", "died")
    assert stay_of(prompt_of(second.stay)) == second.stay


def test_the_last_report_is_the_reference(tables):
    def change(content):
        last = content[0] | {"CHARTDATE": "2999-01-01", "TEXT": 'The "last",\nof two lines'}
        others = [{"DESCRIPTION": "Addendum"}, {"ISERROR": "1"}, {"CATEGORY": "Nursing"}, {"CHARTDATE": "1999-01-01"}]
        return [last, *content, *({**last, "TEXT": f"none {index}", **other} for index, other in enumerate(others))]

    edit(tables, "NOTEEVENTS", change)
    reader = MimicReader(tables, limit=1)
    assert [record.reference for record in reader.records()] == ['The "last",\nof two lines']
    assert reader.tally.counts["discharge summaries left out (addenda, errors, empty)"] == 2


def test_codes_without_a_name_are_told_as_codes(tables):
    edit(tables, "DIAGNOSES_ICD", setting(0, ICD9_CODE="0389"))
    reader = MimicReader(tables)
    assert Event(1, "diagnosis", "ICD-9 0389") in next(reader.records()).stay.events
    assert reader.tally.counts["diagnosis codes without a name"] == 1


# --- what can be wrong -------------------------------------------------------------------------------------------------------


def test_missing_file_column_and_folder(tables):
    edit(tables, "LABEVENTS", lambda content: [{key: row[key] for key in row if key != "FLAG"} for row in content])
    with pytest.raises(UserError, match=r"LABEVENTS\.csv: no column FLAG; it has ROW_ID, SUBJECT_ID"):
        MimicReader(tables)
    (tables / "PRESCRIPTIONS.csv").unlink()
    with pytest.raises(
        UserError, match=r"has no PRESCRIPTIONS\.csv and no PRESCRIPTIONS\.csv\.gz; its tables: ADMISSIONS\.csv"
    ):
        MimicReader(tables, kinds=("drug",))
    with pytest.raises(UserError, match="no such folder"):
        MimicReader(tables / "none")
    (tables / "admissions.csv.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"has ADMISSIONS\.csv and admissions\.csv\.gz; one of them is the table"):
        MimicReader(tables, kinds=("diagnosis",))


def test_not_utf8_names_line_and_byte(tables):
    path = tables / "NOTEEVENTS.csv"
    content = path.read_bytes()
    place = content.index(b"admitted", content.index(b"\n", content.index(b"\n") + 1))
    path.write_bytes(content[:place] + b"\xe9" + content[place:])
    with pytest.raises(
        UserError, match=rf"NOTEEVENTS\.csv line 3: not UTF-8 text \(byte {place} of the file\)\. Save it as UTF-8"
    ):
        read(tables)


def test_truncated_gzip(tmp_path):
    stays = clinical.stays("train", 300)
    write_tables.write_tables(tmp_path / "t", [(stay, None) for stay in stays], gzipped=True)
    path = tmp_path / "t" / "LABEVENTS.csv.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"LABEVENTS\.csv\.gz: a damaged gzip file, or one cut short, readable up to line \d+"):
        read(tmp_path / "t")
    path.write_bytes(b"not gzip")
    with pytest.raises(UserError, match="readable up to line 0"):
        read(tmp_path / "t")


BAD = [
    ("ADMISSIONS", {"ADMITTIME": "soon"}, r"line 2: ADMITTIME is 'soon'; a date such as", "ADMISSIONS: unreadable"),
    ("ADMISSIONS", {"DISCHTIME": "1999-01-01"}, r"DISCHTIME 1999-01-01 is before ADMITTIME", "ADMISSIONS: unreadable"),
    ("ADMISSIONS", {"HADM_ID": "one"}, r"HADM_ID is 'one'; a whole number", "ADMISSIONS: unreadable"),
    (
        "ADMISSIONS",
        {"HADM_ID": "100002"},
        r"line 3: HADM_ID 100002 for the second time \(first: line 2\)",
        "ADMISSIONS: duplicates",
    ),
    ("ADMISSIONS", {"SUBJECT_ID": "999"}, r"SUBJECT_ID 999 is not in PATIENTS\.csv", "ADMISSIONS: no patient"),
    ("PATIENTS", {"GENDER": "X"}, r"GENDER is 'X'; F or M", "PATIENTS: unreadable"),
    ("PATIENTS", {"DOB": "2999-01-01"}, r"born on 2999-01-01", "ADMISSIONS: unreadable"),
    ("LABEVENTS", {"CHARTTIME": "12/31/1999"}, r"LABEVENTS\.csv line 2: CHARTTIME is '12/31/1999'", "LABEVENTS: unreadable"),
    ("LABEVENTS", {"FLAG": "purple"}, r"FLAG is 'purple'; known: ", "LABEVENTS: unreadable"),
    ("DIAGNOSES_ICD", {"SEQ_NUM": "first"}, r"SEQ_NUM is 'first'", "DIAGNOSES_ICD: unreadable"),
    ("PRESCRIPTIONS", {"DRUG": " "}, r"no DRUG", "PRESCRIPTIONS: unreadable"),
]


@pytest.mark.parametrize(("table", "values", "message", "kind"), BAD)
def test_bad_rows_are_errors_or_counted(tables, table, values, message, kind):
    edit(tables, table, setting(0, **values))
    with pytest.raises(UserError, match=message):
        read(tables)
    reader = MimicReader(tables, on_bad_row="drop")
    assert len(list(reader.records())) >= len(STAYS) - 1
    assert reader.tally.dropped[kind] == 1


def test_duplicate_rows(tables):
    edit(tables, "LABEVENTS", lambda content: [*content, content[0] | {"ROW_ID": "999"}])
    line = len((tables / "LABEVENTS.csv").read_text().splitlines())
    with pytest.raises(UserError, match=rf"LABEVENTS\.csv line {line}: the same row for the second time"):
        read(tables)
    reader = MimicReader(tables, on_bad_row="drop")
    assert [record.stay for record in reader.records()] == STAYS
    assert reader.tally.dropped == {"LABEVENTS: duplicates": 1}


def test_admission_without_events(tables):
    for name in ("DIAGNOSES_ICD", "PROCEDURES_ICD", "LABEVENTS", "PRESCRIPTIONS"):
        edit(tables, name, lambda content: [row for row in content if row["HADM_ID"] != "100005"])
    with pytest.raises(UserError, match=r"ADMISSIONS\.csv line 6: the admission 100005 has no events"):
        read(tables)
    reader = MimicReader(tables, on_bad_row="drop")
    assert "100005" not in [record.hadm_id for record in reader.records()]
    assert reader.tally.dropped == {"ADMISSIONS: no events": 1}


def test_rows_of_other_lengths_and_open_quotation_marks(tables):
    path = tables / "PRESCRIPTIONS.csv"
    whole = path.read_text()
    path.write_text(whole + "1,2\n")
    with pytest.raises(UserError, match="2 fields, and the header has 19"):
        read(tables)
    path.write_text(whole + '1,"2\n')
    with pytest.raises(UserError, match="not CSV: .* Is a quotation mark open"):
        read(tables, on_bad_row="drop")
    path.write_text("")
    with pytest.raises(UserError, match="an empty file"):
        read(tables)


@pytest.mark.parametrize(
    "options", [{"labs": "some"}, {"kinds": ()}, {"kinds": ("notes",)}, {"at_once": 0}, {"limit": 0}, {"on_bad_row": "skip"}]
)
def test_bad_options(tables, options):
    with pytest.raises(UserError, match=f"{next(iter(options))} is "):
        MimicReader(tables, **options)


def test_rows_are_read_one_by_one(tmp_path):
    """The first row is there although the file is broken further on."""
    path = tmp_path / "T.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n1,2\n" + b"3,\xff\n"))
    reading = Table(tmp_path, "T", ("A",), ("C",)).rows(Tally())
    assert next(reading) == (2, ["1", ""])
    with pytest.raises(UserError, match=r"line 3: not UTF-8 text \(byte 10 of the unpacked file\)"):
        next(reading)


def test_nothing_is_written_over(tables):
    with pytest.raises(UserError, match="exists already"):
        write_tables.write_tables(tables, [])
    with pytest.raises(UserError, match="exists already"):
        rows.write_rows(tables, MimicReader(tables))


# --- prompts and rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", styles())
def test_instructions_hold_the_record_and_no_figure_of_their_own(style):
    stay = STAYS[0]
    prompt = instruction_prompt(stay, style)
    assert prompt_of(stay).removesuffix("\nsummary:") in prompt
    assert sorted(re.findall(r"\d+", prompt)) == sorted(re.findall(r"\d+", prompt_of(stay)))
    with pytest.raises(UserError, match="choose one of: plain, physician"):
        instruction_prompt(stay, "poem")


def test_instructions_ask_for_dates_and_numbers_as_they_are():
    assert all("every number, unit and date exactly" in text for text in INSTRUCTIONS.values())


def test_rows_for_alignment(tables, tmp_path):
    folder = tmp_path / "rows"
    summary = rows.write_rows(folder, MimicReader(tables), style="plain")
    train, heldout = (load_prompts(folder / f"prompts-{split}.jsonl") for split in ("train", "heldout"))
    assert len(train) + len(heldout) == len(STAYS) and heldout
    assert summary["written"]["prompts-train.jsonl"] == len(train) == summary["written"]["pairs.jsonl"]
    assert {row["prompt"] for row in [*train, *heldout]} == {prompt_of(stay) for stay in STAYS}
    judge = clinical.ClinicalJudge()
    sft, pairs = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in ("sft.jsonl", "pairs.jsonl")
    )
    assert judge.score(sft, [row["completion"] for row in sft]) == [1.0] * len(train)
    assert judge.score(pairs, [row["chosen"] for row in pairs]) == [1.0] * len(pairs)
    assert max(judge.score(pairs, [row["rejected"] for row in pairs])) < 1
    held = {row["stay"] for row in heldout}
    assert not held & {row["stay"] for row in [*train, *pairs]}
    assert "sodium" in json.loads((folder / "lexicon.json").read_text())["lab"]
    again = tmp_path / "again"
    rows.write_rows(again, MimicReader(tables), style="plain")
    assert (again / "pairs.jsonl").read_bytes() == (folder / "pairs.jsonl").read_bytes()


def test_pairs_go_into_a_store_and_the_judge_of_facts_tells_them_apart(tables, tmp_path):
    rows.write_rows(tmp_path / "rows", MimicReader(tables))
    summary = import_text_rows(tmp_path / "rows" / "pairs.jsonl", PairStore(tmp_path / "store"))
    pairs = [json.loads(line) for line in (tmp_path / "rows" / "pairs.jsonl").read_text().splitlines()]
    assert summary["pairs"] == len(pairs) > 30
    judge = ClinicalFactsJudge(lexicon=str(tmp_path / "rows" / "lexicon.json"))
    assert judge.score(pairs, [row["chosen"] for row in pairs]) == [1.0] * len(pairs)
    for row in pairs:
        findings = judge.findings(row, row["rejected"])
        errors = {"altered": findings.altered, "omitted": findings.omitted, "invented": findings.invented}
        assert [error for error, facts in errors.items() if facts] == [row["error"]], row


def test_without_notes_there_are_prompts_only(tables, tmp_path):
    summary = rows.write_rows(tmp_path / "rows", MimicReader(tables, notes=False))
    assert summary["written"]["sft.jsonl"] == summary["written"]["pairs.jsonl"] == 0
    condition = load_prompts(tmp_path / "rows" / "prompts-heldout.jsonl")[0]
    assert "reference" not in condition and condition["prompt"].startswith(INSTRUCTIONS["physician"])
    assert condition["source"] in {prompt_of(stay) for stay in STAYS}


def test_titles_get_their_beginning_as_another_wording():
    names = rows.Names()
    names.add(replace(STAYS[0], events=(Event(1, "diagnosis", "Pneumonia, organism NOS"),)))
    assert names.lexicon()["diagnosis"] == {"Pneumonia, organism NOS": ["Pneumonia"]}


def test_corruption_makes_one_error_and_leaves_the_rest():
    summaries = [clinical.summary_of(stay) for stay in STAYS]
    rng, seen = random.Random(0), set()
    for text in summaries * 5:
        worse = corrupt(text, rng, donors=summaries)
        assert worse is not None and worse.text != text
        seen.add(worse.error)
        if worse.error == "altered":
            assert len(worse.text) == len(text) and worse.text.replace(worse.after, "") != worse.text
        elif worse.error == "omitted":
            assert sorted([*worse.text.split(), *worse.before.split()]) == sorted(text.split())
        else:
            assert worse.after not in text and worse.text.replace(f" {worse.after}", "", 1) == text
    assert seen == {"altered", "omitted", "invented"}


def text_of(found) -> str:
    assert found is not None
    return found.text


def test_corruption_where_little_is_possible():
    rng = random.Random(0)
    assert corrupt("nothing here", rng) is None
    assert text_of(corrupt("nothing here", rng, donors=["One. Two. Three."], errors=("invented",))) == "nothing here Two."
    assert {text_of(corrupt("Dose 10.", rng, errors=("altered",)))[5] for _ in range(60)} == set("123456789")
    assert re.fullmatch(r"Dose \d{4}-\d\d-\d\d\.", text_of(corrupt("Dose 2134-02-31.", rng)))
    with pytest.raises(ValueError, match="no such error: lost"):
        corrupt("x", rng, errors=("lost",))


def test_command_lines(tmp_path, capsys):
    assert write_tables.main([str(tmp_path / "t"), "--count", "12", "--gzip", "--split", "heldout"]) == 0
    assert "12 admissions in 10 tables" in capsys.readouterr().out
    assert rows.main([str(tmp_path / "t"), str(tmp_path / "r"), "--style", "brief", "--errors", "altered"]) == 0
    assert "in pairs.jsonl" in capsys.readouterr().out
    assert rows.main([str(tmp_path / "t"), str(tmp_path / "r")]) == 2
    assert "error: " in capsys.readouterr().err
    assert write_tables.main([str(tmp_path / "u"), "--count", "0"]) == 2


def test_a_moment_with_a_time_zone_is_refused() -> None:
    """It would not compare with the others, which have none."""
    with pytest.raises(ValueError, match="CHARTTIME is .* without a time zone"):
        _moment("2134-03-05 14:30:00+00:00", "CHARTTIME")
