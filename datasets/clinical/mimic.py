"""Hospital stays from tables in MIMIC-III's layout (Johnson et al., Scientific Data 2016).

Needed: ADMISSIONS and PATIENTS; for each kind of event its own tables (DIAGNOSES_ICD with D_ICD_DIAGNOSES, PROCEDURES_ICD with
D_ICD_PROCEDURES, LABEVENTS with D_LABITEMS, PRESCRIPTIONS); NOTEEVENTS for the doctors' discharge summaries, which are taken
as references. The data themselves are not here and never will be: whoever uses them needs an own credentialed access to
PhysioNet's MIMIC-III, and is bound by its terms, among them what may be sent to services of others. ``write_tables`` makes
tables of invented patients to try everything with.

What the tables do not say is not made up. Diagnoses are codes of a stay, given at its end and without dates; they are told on
day 1, and their day is no fact. Procedures have a date only where the table has a column CHARTDATE (MIMIC-IV has it), else
they are undated. A laboratory value is ``low``, ``high`` or ``abnormal`` as its FLAG says, else ``normal``; it is told as
VALUE writes it, never rounded. A patient older than 89 has a shifted date of birth in MIMIC-III, and is told as 90. Events
outside of the stay (laboratory values of an emergency department the day before, prescriptions for afterwards) are left out
and counted, since a stay begins with its day 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Literal

from polyalign.core.errors import UserError
from polyalign.datasets.clinical.layout import DESTINATIONS, NOWHERE, PROCEDURE_DATE
from polyalign.datasets.clinical.stay import FLAGS, Event, Flag, Kind, Sex, Stay, in_order
from polyalign.datasets.clinical.tables import OnBadRow, Table, Tally, whole

Labs = Literal["abnormal", "all"]
KINDS: tuple[Kind, ...] = ("diagnosis", "procedure", "lab", "drug")
HIDDEN_AGE = 90
"""What stands for an age above 89, which MIMIC-III hides by setting the date of birth 300 years back."""
_HIDDEN_FROM = 150
_LAB_FLAGS = {"": "normal", "delta": "normal", "l": "low", "h": "high", **FLAGS}


@dataclass(frozen=True)
class Record:
    """A stay with where it comes from, and what a doctor wrote of it (None where there is no discharge summary)."""

    subject_id: str
    hadm_id: str
    stay: Stay
    reference: str | None


@dataclass(frozen=True)
class _Admission:
    subject_id: str
    hadm_id: str
    admitted: date
    discharged: date
    destination: str
    line: int


@dataclass(frozen=True)
class _Dated:
    """An event and the moment it is sorted by; None is undated."""

    moment: datetime | None
    rank: int
    event: Event


class MimicReader:
    """Stays from the tables of a folder.

    Every table and its columns are looked up when the reader is made; the tables are read when :meth:`records` is gone through.

    Args:
        folder: with the tables, as CSV, plain or gzipped.
        kinds: which events to take; tables of others are not needed.
        labs: ``abnormal``, those whose FLAG is set (without ``delta``, which says that a value changed), or ``all``.
        notes: take discharge summaries as references; then NOTEEVENTS is needed.
        admissions: the HADM_IDs wanted, None for all.
        limit: at most so many admissions, in the table's order.
        on_bad_row: ``error``, or ``drop`` to leave bad rows out and count them in ``tally.dropped``.
        at_once: admissions held in memory, up to some 100 kB each; the large tables are read once for each so many.

    Raises:
        UserError: a table or a column is missing, or an option is none of the allowed.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        kinds: Collection[Kind] = KINDS,
        labs: Labs = "abnormal",
        notes: bool = True,
        admissions: Collection[str] | None = None,
        limit: int | None = None,
        on_bad_row: OnBadRow = "error",
        at_once: int = 5000,
    ):
        folder = Path(folder)
        if not kinds or not set(kinds) <= set(KINDS):
            raise UserError(f"kinds is {sorted(kinds)}; one or more of: {', '.join(KINDS)}")
        if labs not in ("abnormal", "all"):
            raise UserError(f"labs is {labs!r}; allowed: abnormal, all")
        for name, number in (("at_once", at_once), ("limit", limit)):
            if number is not None and number < 1:
                raise UserError(f"{name} is {number}; a whole number from 1 is needed")
        self.tally, self.labs, self.limit, self.at_once = Tally(on_bad_row), labs, limit, at_once
        self.wanted = None if admissions is None else {whole(str(one)) for one in admissions}
        columns = ("SUBJECT_ID", "HADM_ID", "ADMITTIME", "DISCHTIME", "DISCHARGE_LOCATION")
        self.admissions = Table(folder, "ADMISSIONS", columns, ("HOSPITAL_EXPIRE_FLAG",))
        self.patients = Table(folder, "PATIENTS", ("SUBJECT_ID", "GENDER", "DOB"))
        self.tables, self.names = {}, {}
        for kind in (kind for kind in KINDS if kind in kinds):
            name, needed, optional, names = _TABLES[kind]
            self.tables[kind] = Table(folder, name, needed, optional)
            if names:
                self.names[kind] = Table(folder, *names)
        self.notes = None
        if notes:
            self.notes = Table(folder, "NOTEEVENTS", ("HADM_ID", "CATEGORY", "TEXT"), ("CHARTDATE", "DESCRIPTION", "ISERROR"))

    def records(self) -> Iterator[Record]:
        """The stays, in the order of ADMISSIONS.

        Raises:
            UserError: a file is damaged or not UTF-8, or a row is bad and must not be.
        """
        patients = self._read_patients()
        admissions = list(self._read_admissions())
        names = {kind: self._read_names(kind) for kind in self.names}
        for start in range(0, len(admissions), self.at_once):
            part = admissions[start : start + self.at_once]
            events: dict[str, list[_Dated]] = {admission.hadm_id: [] for admission in part}
            for kind in self.tables:
                self._read_events(kind, {one.hadm_id: one for one in part}, names.get(kind, {}), events)
            references = self._read_notes(events)
            for admission in part:
                if record := self._record(admission, patients, events[admission.hadm_id], references.get(admission.hadm_id)):
                    yield record

    def _read_patients(self) -> dict[str, tuple[Sex, date]]:
        found: dict[str, tuple[Sex, date]] = {}
        for line, (subject, gender, born) in self.patients.rows(self.tally):
            try:
                found[whole(subject)] = (_sex(gender), _moment(born, "DOB").date())
            except ValueError as error:
                self._bad(self.patients, line, "unreadable", str(error))
        return found

    def _read_admissions(self) -> Iterator[_Admission]:
        seen: dict[str, int] = {}
        for line, (subject, hadm, begin, end, location, expired) in self.admissions.rows(self.tally):
            hadm = whole(hadm)
            if self.wanted is not None and hadm not in self.wanted:
                continue
            if self.limit is not None and len(seen) == self.limit:
                return
            try:
                admission = _admission(whole(subject), hadm, begin, end, location, expired, line)
            except ValueError as error:
                self._bad(self.admissions, line, "unreadable", str(error))
                continue
            if hadm in seen:
                self._bad(self.admissions, line, "duplicates", f"HADM_ID {hadm} for the second time (first: line {seen[hadm]})")
                continue
            seen[hadm] = line
            self.tally.counts["admissions"] += 1
            yield admission
        absent = sorted((self.wanted or set()) - set(seen))
        if absent and self.tally.on_bad_row == "error":
            raise UserError(
                f"{self.admissions.path} has no admission {', '.join(absent[:5])} ({len(absent)} of those asked for)"
            )

    def _read_names(self, kind: Kind) -> dict[str, str]:
        table = self.names[kind]
        return {whole(code): _line(name + _fluid(rest)) for _, (code, name, *rest) in table.rows(self.tally) if name}

    def _read_events(
        self, kind: Kind, admissions: dict[str, _Admission], names: dict[str, str], into: dict[str, list[_Dated]]
    ) -> None:
        table, make = self.tables[kind], _EVENTS[kind]
        for line, row in table.rows(self.tally, where=("HADM_ID", admissions)):
            self.tally.counts[f"{kind} rows"] += 1
            admission = admissions[row[0]]
            try:
                dated = make(self, admission, row, names)
            except ValueError as error:
                self._bad(table, line, "unreadable", str(error))
                continue
            if dated is not None and not 0 <= dated.event.day <= _days(admission):
                self.tally.counts[f"{kind} events outside of the stay"] += 1
            elif dated is not None:
                into[admission.hadm_id].append(dated)

    def _read_notes(self, wanted: Collection[str]) -> dict[str, str]:
        """The last discharge summary of each admission; its addenda, and reports marked as errors, are left out and counted."""
        latest: dict[str, tuple[str, str]] = {}
        if self.notes is None:
            return {}
        for _, (hadm, category, text, day, description, wrong) in self.notes.rows(self.tally, where=("HADM_ID", wanted)):
            if category.casefold() != "discharge summary":
                continue
            if whole(wrong) == "1" or description.casefold() == "addendum" or not text:
                self.tally.counts["discharge summaries left out (addenda, errors, empty)"] += 1
                continue
            if hadm in latest:
                self.tally.counts["discharge summaries left out (earlier ones)"] += 1
            if hadm not in latest or day >= latest[hadm][0]:
                latest[hadm] = (day, text)
        return {hadm: text for hadm, (_, text) in latest.items()}

    def _record(
        self, admission: _Admission, patients: dict[str, tuple[Sex, date]], events: Sequence[_Dated], reference: str | None
    ) -> Record | None:
        patient = patients.get(admission.subject_id)
        if patient is None:
            message = f"SUBJECT_ID {admission.subject_id} is not in {self.patients.path.name}, which says sex and age"
            return self._bad(self.admissions, admission.line, "no patient", message)
        if not events:
            message = f"the admission {admission.hadm_id} has no events ({', '.join(self.tables)}; labs: {self.labs})"
            return self._bad(self.admissions, admission.line, "no events", message)
        sex, born = patient
        age = (
            admission.admitted.year - born.year - ((admission.admitted.month, admission.admitted.day) < (born.month, born.day))
        )
        if not 0 <= age:
            return self._bad(self.admissions, admission.line, "unreadable", f"admitted on {admission.admitted}, born on {born}")
        if age >= _HIDDEN_FROM:
            self.tally.counts["ages above 89, told as 90"] += 1
            age = HIDDEN_AGE
        self.tally.counts["stays"] += 1
        self.tally.counts["stays with a reference"] += reference is not None
        ordered = sorted(events, key=lambda one: (one.moment is not None, one.moment or datetime.min, one.rank))
        stay = Stay(
            sex=sex,
            age=age,
            admitted=admission.admitted,
            discharged=admission.discharged,
            destination=admission.destination,
            events=in_order([one.event for one in ordered]),
        )
        return Record(admission.subject_id, admission.hadm_id, stay, reference)

    def _bad(self, table: Table, line: int, kind: str, message: str) -> None:
        self.tally.bad(f"{table.path} line {line}", f"{table.name}: {kind}", message)

    def _name(self, kind: Kind, code: str, names: dict[str, str]) -> str:
        """The name of a code; codes that their table does not know are told as codes, and counted."""
        if code in names:
            return names[code]
        self.tally.counts[f"{kind} codes without a name"] += 1
        return f"item {code}" if kind == "lab" else f"ICD-9 {code}"

    # --- a row of each table as an event ---

    def _diagnosis(self, admission: _Admission, row: Sequence[str], names: dict[str, str]) -> _Dated | None:
        _, code, rank = row
        if not code:  # MIMIC-III has some admissions without a diagnosis
            self.tally.counts["diagnosis rows without a code"] += 1
            return None
        return _Dated(None, _rank(rank), Event(1, "diagnosis", self._name("diagnosis", code, names)))

    def _procedure(self, admission: _Admission, row: Sequence[str], names: dict[str, str]) -> _Dated | None:
        _, code, rank, when = row
        if not code:
            raise ValueError("no ICD9_CODE")
        day, moment = _day(admission, when, PROCEDURE_DATE)
        return _Dated(moment, _rank(rank), Event(day, "procedure", self._name("procedure", code, names)))

    def _lab(self, admission: _Admission, row: Sequence[str], names: dict[str, str]) -> _Dated | None:
        _, item, when, value, unit, flag, number = row
        if flag.casefold() not in _LAB_FLAGS:
            raise ValueError(f"FLAG is {flag!r}; known: {', '.join(name for name in _LAB_FLAGS if name)}, or nothing")
        told: Flag = FLAGS[_LAB_FLAGS[flag.casefold()]]
        if self.labs == "abnormal" and told == "normal":
            return None
        if not value and not number:
            self.tally.counts["lab rows without a value"] += 1
            return None
        day, moment = _day(admission, when, "CHARTTIME")
        name = self._name("lab", whole(item), names)
        return _Dated(moment, 0, Event(day, "lab", name, _line(value or number), _line(unit) or None, told))

    def _drug(self, admission: _Admission, row: Sequence[str], names: dict[str, str]) -> _Dated | None:
        _, drug, when, dose, unit = row
        if not drug:
            raise ValueError("no DRUG")
        day, moment = _day(admission, when, "STARTDATE")
        return _Dated(moment, 0, Event(day, "drug", _line(drug), _line(dose) or None, _line(unit) or None))


_EVENTS: dict[Kind, Callable[[MimicReader, _Admission, Sequence[str], dict[str, str]], _Dated | None]] = {
    "diagnosis": MimicReader._diagnosis,
    "procedure": MimicReader._procedure,
    "lab": MimicReader._lab,
    "drug": MimicReader._drug,
}
_TABLES = {
    "diagnosis": ("DIAGNOSES_ICD", ("HADM_ID", "ICD9_CODE", "SEQ_NUM"), (), ("D_ICD_DIAGNOSES", ("ICD9_CODE", "LONG_TITLE"))),
    "procedure": (
        "PROCEDURES_ICD",
        ("HADM_ID", "ICD9_CODE", "SEQ_NUM"),
        (PROCEDURE_DATE,),
        ("D_ICD_PROCEDURES", ("ICD9_CODE", "LONG_TITLE")),
    ),
    "lab": (
        "LABEVENTS",
        ("HADM_ID", "ITEMID", "CHARTTIME", "VALUE", "VALUEUOM", "FLAG"),
        ("VALUENUM",),
        ("D_LABITEMS", ("ITEMID", "LABEL"), ("FLUID",)),
    ),
    "drug": ("PRESCRIPTIONS", ("HADM_ID", "DRUG", "STARTDATE", "DOSE_VAL_RX", "DOSE_UNIT_RX"), (), None),
}
"""For each kind of event its table with the columns needed and optional, and the table of its names."""


def _sex(gender: str) -> Sex:
    if gender.upper() not in ("F", "M"):
        raise ValueError(f"GENDER is {gender!r}; F or M is needed")
    return "woman" if gender.upper() == "F" else "man"


def _admission(subject: str, hadm: str, begin: str, end: str, location: str, expired: str, line: int) -> _Admission:
    if not hadm.isdigit():
        raise ValueError(f"HADM_ID is {hadm!r}; a whole number is needed")
    admitted, discharged = _moment(begin, "ADMITTIME").date(), _moment(end, "DISCHTIME").date()
    if discharged < admitted:
        raise ValueError(f"DISCHTIME {end} is before ADMITTIME {begin}")
    destination = "died" if whole(expired) == "1" else _destination(location)
    return _Admission(subject, hadm, admitted, discharged, destination, line)


def _destination(location: str) -> str:
    """The location as a phrase; one that is not in the layout's list in its own words, without digits and commas."""
    if not location:
        return NOWHERE
    known = DESTINATIONS.get(location.upper())
    told = " ".join("".join(letter if letter.isalpha() or letter in "-/" else " " for letter in location.lower()).split())
    return known or (f"discharged to {told}" if told else NOWHERE)


def _days(admission: _Admission) -> int:
    return (admission.discharged - admission.admitted).days + 1


def _day(admission: _Admission, text: str, column: str) -> tuple[int, datetime | None]:
    """(day of the stay, the moment); (0, None) without a date. A day before the stay is negative, never 0."""
    if not text:
        return 0, None
    moment = _moment(text, column)
    day = (moment.date() - admission.admitted).days + 1
    return (day if day > 0 else day - 1), moment


def _moment(text: str, column: str) -> datetime:
    wanted = f"{column} is {text!r}; a date such as 2134-03-05 or 2134-03-05 14:30:00 is needed"
    try:
        found = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(wanted) from error
    if found.tzinfo is not None:  # does not compare with the others
        raise ValueError(f"{wanted}, without a time zone")
    return found


def _rank(text: str) -> int:
    text = whole(text)
    if text and not text.isdigit():
        raise ValueError(f"SEQ_NUM is {text!r}; a whole number is needed")
    return int(text or 0)


def _line(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())


def _fluid(rest: Sequence[str]) -> str:
    """What a laboratory value is of, where it is not blood: the sodium of urine is another."""
    fluid = rest[0].casefold() if rest else ""
    return "" if fluid in ("", "blood") else f" ({fluid})"
