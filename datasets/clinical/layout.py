"""The columns of MIMIC-III's tables, and its words for where patients go. Nothing here is data of a patient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

COLUMNS: Mapping[str, Sequence[str]] = {
    name: columns.split()
    for name, columns in {
        "ADMISSIONS": "ROW_ID SUBJECT_ID HADM_ID ADMITTIME DISCHTIME DEATHTIME ADMISSION_TYPE ADMISSION_LOCATION "
        "DISCHARGE_LOCATION INSURANCE LANGUAGE RELIGION MARITAL_STATUS ETHNICITY EDREGTIME EDOUTTIME DIAGNOSIS "
        "HOSPITAL_EXPIRE_FLAG HAS_CHARTEVENTS_DATA",
        "PATIENTS": "ROW_ID SUBJECT_ID GENDER DOB DOD DOD_HOSP DOD_SSN EXPIRE_FLAG",
        "DIAGNOSES_ICD": "ROW_ID SUBJECT_ID HADM_ID SEQ_NUM ICD9_CODE",
        "D_ICD_DIAGNOSES": "ROW_ID ICD9_CODE SHORT_TITLE LONG_TITLE",
        "PROCEDURES_ICD": "ROW_ID SUBJECT_ID HADM_ID SEQ_NUM ICD9_CODE",
        "D_ICD_PROCEDURES": "ROW_ID ICD9_CODE SHORT_TITLE LONG_TITLE",
        "LABEVENTS": "ROW_ID SUBJECT_ID HADM_ID ITEMID CHARTTIME VALUE VALUENUM VALUEUOM FLAG",
        "D_LABITEMS": "ROW_ID ITEMID LABEL FLUID CATEGORY LOINC_CODE",
        "PRESCRIPTIONS": "ROW_ID SUBJECT_ID HADM_ID ICUSTAY_ID STARTDATE ENDDATE DRUG_TYPE DRUG DRUG_NAME_POE "
        "DRUG_NAME_GENERIC FORMULARY_DRUG_CD GSN NDC PROD_STRENGTH DOSE_VAL_RX DOSE_UNIT_RX FORM_VAL_DISP FORM_UNIT_DISP ROUTE",
        "NOTEEVENTS": "ROW_ID SUBJECT_ID HADM_ID CHARTDATE CHARTTIME STORETIME CATEGORY DESCRIPTION CGID ISERROR TEXT",
    }.items()
}
PROCEDURE_DATE = "CHARTDATE"
"""MIMIC-III's PROCEDURES_ICD has no dates; MIMIC-IV's has this column, and it is read where a table has it."""

DESTINATIONS: Mapping[str, str] = {
    "HOME": "discharged home",
    "HOME HEALTH CARE": "discharged home with health care",
    "HOME WITH HOME IV PROVIDR": "discharged home with infusions",
    "REHAB/DISTINCT PART HOSP": "discharged to rehabilitation",
    "SNF": "discharged to a nursing facility",
    "SNF-MEDICAID ONLY CERTIF": "discharged to a nursing facility",
    "ICF": "discharged to an intermediate care facility",
    "LONG TERM CARE HOSPITAL": "discharged to a long-term care hospital",
    "SHORT TERM HOSPITAL": "discharged to another hospital",
    "HOSPICE-MEDICAL FACILITY": "discharged to hospice",
    "HOSPICE-HOME": "discharged to hospice at home",
    "DISCH-TRAN TO PSYCH HOSP": "discharged to a psychiatric hospital",
    "DISC-TRAN CANCER/CHLDRN H": "discharged to a hospital for cancer or for children",
    "DISC-TRAN TO FEDERAL HC": "discharged to a federal hospital",
    "LEFT AGAINST MEDICAL ADVI": "discharged against medical advice",
    "OTHER FACILITY": "discharged to another facility",
    "DEAD/EXPIRED": "died",
}
"""DISCHARGE_LOCATION as a stay says it."""
NOWHERE = "discharged"
"""Where no location is given."""
