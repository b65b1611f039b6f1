"""The tables, read back through the MIMIC-III adapter and the clean protocol."""

import gzip

import numpy as np
import pyarrow.csv as pacsv
import pytest

from cafemed import drugs, protocols
from cafemed.protocols import CohortConfig
from cafemed.sources import mimic3
from cafemed.synthetic import generate, write_tables
from cafemed.synthetic.tables import start_shares


@pytest.fixture(scope="module")
def cohort(folder):
    records = mimic3.read(folder)
    return protocols.clean(records, drugs.read(drugs.locate(folder / "drugs")), CohortConfig())[0]


def table(folder, name):
    return pacsv.read_csv(folder / f"{name}.csv.gz").to_pandas()


def test_the_adapter_reads_the_same_visits(population, cohort):
    np.testing.assert_array_equal(cohort.patient_offsets, population.patient_offsets)
    for kind, name in (
        ("diagnosis", "diagnoses"),
        ("procedure", "procedures"),
        ("medication", "medications"),
    ):
        read, drawn = getattr(cohort, name), getattr(population, name)
        read_names = np.array(cohort.vocabularies[kind])
        drawn_names = np.array(getattr(population.model, name))
        np.testing.assert_array_equal(read.offsets, drawn.offsets)
        found, expected = read_names[read.ids], drawn_names[drawn.ids]
        if kind == "medication":  # these are ordered by their start
            visit = np.repeat(np.arange(len(read)), read.counts)
            found = found[np.lexsort((found, visit))]
            expected = expected[np.lexsort((expected, visit))]
        np.testing.assert_array_equal(found, expected)


def test_the_adapter_reads_the_same_interactions(population, cohort):
    drawn = np.array(population.model.medications)
    place = np.searchsorted(drawn, cohort.vocabularies["medication"])
    np.testing.assert_array_equal(cohort.ddi, population.model.ddi[np.ix_(place, place)])


def test_visits_are_in_time_order_and_identifiers_are_not(cohort):
    later = ~cohort.is_first_visit()[1:]
    assert (np.diff(cohort.admitted)[later] > np.timedelta64(0)).all()
    rising = np.diff(np.array(cohort.visit_ids, np.int64))[later] > 0
    assert 0.4 < rising.mean() < 0.6
    assert ((cohort.age >= 18) & (cohort.age < 130)).all()


def test_several_rows_and_drug_codes_a_medication(folder, population):
    rows = table(folder, "PRESCRIPTIONS")
    known = pacsv.read_csv(folder / "drugs" / "ndc_to_atc3.csv").to_pandas()
    assert known.groupby("atc3").size().mean() > 2
    assert len(rows) > 1.5 * len(population.medications.ids)
    assert 0.03 < (rows["NDC"] == 0).mean() < 0.07
    unmapped = ~rows["NDC"].isin(known["ndc"]) & (rows["NDC"] != 0)
    assert 0.01 < unmapped.mean() < 0.04
    assert (rows.loc[unmapped | (rows["NDC"] == 0), "DRUG"] == "Other").all()
    drug = rows.merge(known, left_on="NDC", right_on="ndc")
    assert (drug["DRUG"] == "Drug " + drug["atc3"]).all()
    with gzip.open(folder / "PRESCRIPTIONS.csv.gz", "rt") as text:
        ndc = text.read().splitlines()[1].split(",")[-1].strip('"')
    assert ndc == "0" or len(ndc) == 11


def test_medications_start_over_the_stay_as_stated(folder):
    rows = table(folder, "PRESCRIPTIONS").merge(table(folder, "ADMISSIONS"), on="HADM_ID")
    rows = rows[rows["DRUG"] != "Other"]
    assert (rows["STARTDATE"] <= rows["DISCHTIME"]).all()
    first = rows.groupby(["HADM_ID", "DRUG"])[["STARTDATE", "ADMITTIME"]].min()
    day = (first["STARTDATE"] - first["ADMITTIME"].dt.normalize()).dt.days.to_numpy()
    found = np.bincount(day, minlength=4)[:4] / len(day)
    assert start_shares().sum() == pytest.approx(1)
    np.testing.assert_allclose(found, start_shares()[:4], atol=0.01)


def test_the_same_population_gives_the_same_bytes(folder, population, tmp_path):
    write_tables(generate(population.config, population.seed), tmp_path)
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(files) == 12
    for file in files:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes(), file
