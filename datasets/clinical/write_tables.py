"""Tables in MIMIC-III's layout of patients that never were, from the world ``clinical``::

    python -m polyalign.datasets.clinical.write_tables tables --count 100

Reading them (:mod:`polyalign.datasets.clinical.mimic`) gives the world's own prompts back, to the letter. The codes are of no
classification, and PROCEDURES_ICD has the column CHARTDATE, which MIMIC-III has not.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import sys
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time, timedelta
from pathlib import Path

from polyalign.core.errors import UserError
from polyalign.core.files import atomic_write
from polyalign.datasets.clinical.layout import COLUMNS, DESTINATIONS, PROCEDURE_DATE
from polyalign.datasets.clinical.stay import Event, Kind, Stay, day_of
from polyalign.datasets.worlds import clinical

Row = Mapping[str, object]
FIRST_ADMISSION, FIRST_SUBJECT, FIRST_ITEM = 100001, 1, 50801
"""Where the numbers of each kind begin: six digits of an admission and five of a laboratory value, as the real ones."""
_LOCATIONS = {phrase: location for location, phrase in reversed(list(DESTINATIONS.items()))}


def write_tables(folder: str | Path, stays: Sequence[tuple[Stay, str | None]], *, gzipped: bool = False) -> list[Path]:
    """Stays, each with its discharge summary or None, as the ten tables in ``folder``; each stay is a patient of its own.

    Raises:
        UserError: there is something in ``folder`` already.
        ValueError: a stay has no date of a laboratory value or drug, or a destination that the layout has no location for.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; nothing was written. Give another folder, or move this one away")
    written = []
    for name, rows in tables_of(stays).items():
        columns = [*COLUMNS[name], *([PROCEDURE_DATE] if name == "PROCEDURES_ICD" else [])]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({"ROW_ID": number, **row} for number, row in enumerate(rows, start=1))
        content = text.getvalue().encode()
        path = folder / f"{name}.csv{'.gz' if gzipped else ''}"
        atomic_write(path, gzip.compress(content, mtime=0) if gzipped else content)
        written.append(path)
    return written


def tables_of(stays: Sequence[tuple[Stay, str | None]]) -> dict[str, list[Row]]:
    """The rows of each table, without ROW_ID; see :func:`write_tables`."""
    tables: dict[str, list[Row]] = {name: [] for name in COLUMNS}
    codes = _Codes(tables)
    for index, (stay, summary) in enumerate(stays):
        own = {"SUBJECT_ID": FIRST_SUBJECT + index, "HADM_ID": FIRST_ADMISSION + index}
        tables["PATIENTS"].append(_patient(stay, own["SUBJECT_ID"]))
        tables["ADMISSIONS"].append({**own, **_admission(stay)})
        for number, event in enumerate(stay.events, start=1):
            table, row = _event(stay, event, number, codes)
            tables[table].append({**own, **row})
        if summary is not None:
            note = {"CATEGORY": "Discharge summary", "DESCRIPTION": "Report", "TEXT": summary}
            tables["NOTEEVENTS"].append({**own, "CHARTDATE": stay.discharged.isoformat(), **note})
    return tables


class _Codes:
    """Codes for names, made as they are needed, in the tables that say what they mean."""

    def __init__(self, tables: dict[str, list[Row]]):
        self.tables = tables
        self.known: dict[tuple[Kind, str], str] = {}

    def of(self, kind: Kind, name: str) -> str:
        if (kind, name) not in self.known:
            number = sum(other == kind for other, _ in self.known)
            table = {"diagnosis": "D_ICD_DIAGNOSES", "procedure": "D_ICD_PROCEDURES", "lab": "D_LABITEMS"}[kind]
            code = str(FIRST_ITEM + number) if kind == "lab" else f"{kind[0].upper()}{number:04d}"
            self.known[kind, name] = code
            lab: Row = {"ITEMID": code, "LABEL": name, "FLUID": "Blood", "CATEGORY": "Chemistry"}
            title: Row = {"ICD9_CODE": code, "SHORT_TITLE": name[:24], "LONG_TITLE": name}
            self.tables[table].append(lab if kind == "lab" else title)
        return self.known[kind, name]


def _patient(stay: Stay, subject: int) -> Row:
    year, month, day = stay.admitted.year - stay.age, stay.admitted.month, stay.admitted.day
    born = date(year, month, 28 if (month, day) == (2, 29) else day)
    return {"SUBJECT_ID": subject, "GENDER": "F" if stay.sex == "woman" else "M", "DOB": _at(born), "EXPIRE_FLAG": 0}


def _admission(stay: Stay) -> Row:
    location = _LOCATIONS.get(stay.destination)
    if location is None:
        raise ValueError(f"no DISCHARGE_LOCATION for {stay.destination!r}; known: {', '.join(_LOCATIONS)}")
    died = int(stay.destination == "died")
    end = _at(stay.discharged, hour=23)
    return {
        "ADMITTIME": _at(stay.admitted),
        "DISCHTIME": end,
        "DEATHTIME": end if died else "",
        "DISCHARGE_LOCATION": location,
        "HOSPITAL_EXPIRE_FLAG": died,
        "HAS_CHARTEVENTS_DATA": 0,
    }


def _event(stay: Stay, event: Event, number: int, codes: _Codes) -> tuple[str, Row]:
    """Table and row of an event; ``number``, its place in the stay, keeps the order of what happened on one day."""
    if event.kind == "diagnosis":
        return "DIAGNOSES_ICD", {"SEQ_NUM": number, "ICD9_CODE": codes.of("diagnosis", event.name)}
    when = "" if event.day == 0 else _at(day_of(stay, event), hour=6, minutes=number)
    if event.kind == "procedure":
        code = codes.of("procedure", event.name)
        return "PROCEDURES_ICD", {"SEQ_NUM": number, "ICD9_CODE": code, PROCEDURE_DATE: when}
    if not when:
        raise ValueError(f"{event.name} has no date; laboratory values and drugs need one")
    if event.kind == "lab":
        value = {"VALUE": event.value, "VALUENUM": event.value, "VALUEUOM": event.unit}
        flag = "" if event.flag == "normal" else event.flag
        return "LABEVENTS", {"ITEMID": codes.of("lab", event.name), "CHARTTIME": when, **value, "FLAG": flag}
    dose = {"DOSE_VAL_RX": event.value, "DOSE_UNIT_RX": event.unit}
    day = _at(day_of(stay, event))  # a prescription's date has no time of day
    return "PRESCRIPTIONS", {"STARTDATE": day, "ENDDATE": day, "DRUG_TYPE": "MAIN", "DRUG": event.name, **dose}


def _at(day: date, *, hour: int = 0, minutes: int = 0) -> str:
    return (datetime.combine(day, time(hour)) + timedelta(minutes=minutes)).isoformat(" ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m polyalign.datasets.clinical.write_tables",
        description="Invented patients as tables in MIMIC-III's layout",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to; must not be there yet, or be empty")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="admissions (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "heldout"), default="train", help="of the world (default: train)")
    parser.add_argument("--gzip", action="store_true", help="write .csv.gz")
    given = parser.parse_args(arguments)
    try:
        if given.count < 1:
            raise UserError(f"--count is {given.count}; at least 1 is needed")
        stays = clinical.stays(given.split, given.count, given.seed)
        written = write_tables(given.folder, [(stay, clinical.summary_of(stay)) for stay in stays], gzipped=given.gzip)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{given.folder}: {given.count} admissions in {len(written)} tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
