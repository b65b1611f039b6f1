"""From a source to a cohort folder: what `jobs/prepare.py` runs."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from cafemed import artifacts, cohort, console, drugs, molecules, protocols, synthetic
from cafemed.cohort import Cohort
from cafemed.config import Range
from cafemed.drugs import DrugKnowledge
from cafemed.errors import ConfigError
from cafemed.protocols import CohortConfig
from cafemed.records import Dropped, Records, SourceFile
from cafemed.sources import laboratory, mimic3, mimic4, names, reading, tables
from cafemed.sources.laboratory import LaboratoryTable
from cafemed.sources.reading import InputFile
from cafemed.sources.tables import Systems
from cafemed.synthetic import SyntheticConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the records and the drug tables are, and how they become a cohort.

    Attributes:
        source: which adapter reads the records.
        root: folder of the tables; not used by "synthetic".
        drugs: folder with ndc_to_atc3.csv, ddi_atc3.csv and perhaps atc3_smiles.csv.
        ndc_to_atc, ddi, smiles: single files, each instead of that folder's.
        molecules: read the molecules of medications from the SMILES; needs RDKit.
        names: CSV or Parquet table of the codes' names, for the endpoint's answers.
        systems: code systems of a user's own table, where its rows name none.
        seed: of the synthetic population.
        generator: the synthetic population.
        cohort: the protocol and its settings.
    """

    source: Literal["synthetic", "mimic3", "mimic4", "tables"] = "synthetic"
    root: str | None = None
    drugs: str | None = None
    ndc_to_atc: str | None = None
    ddi: str | None = None
    smiles: str | None = None
    molecules: bool = False
    names: str | None = None
    systems: Systems = dataclasses.field(default_factory=Systems)
    seed: Annotated[int, Range(0)] = 0
    generator: SyntheticConfig = dataclasses.field(default_factory=SyntheticConfig)
    cohort: CohortConfig = dataclasses.field(default_factory=CohortConfig)

    def __post_init__(self) -> None:
        """Checks what needs two settings at once."""
        if self.source == "tables" and self.cohort.protocol == "published":
            raise ConfigError(
                "cohort.protocol: published is defined on MIMIC's tables alone, source=tables "
                "needs clean"
            )


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The files of a cohort, found and identified, not yet read."""

    root: Path
    tables: Mapping[str, InputFile]
    drugs: Mapping[str, InputFile]
    names: InputFile | None = None

    def fingerprints(self) -> dict[str, str]:
        """Name of each input → SHA-256."""
        files = {**self.tables, **self.drugs} | ({"names": self.names} if self.names else {})
        return {name: file.sha256 for name, file in files.items()}


def make_tables(config: DataConfig, folder: Path, force: bool) -> None:
    """Writes the synthetic tables into an artifact folder, unless they are there already."""
    settings = {"seed": config.seed, **dataclasses.asdict(config.generator)}
    if console.is_done(folder, "tables", artifacts.fingerprint("tables", {}, settings), force):
        return
    console.say("tables", f"drawing {config.generator.num_patients} synthetic patients")
    with artifacts.new_folder(folder, "tables", {}, settings, private=True) as (partial, report):
        population = synthetic.generate(config.generator, config.seed)
        report["rows"] = synthetic.write_tables(population, partial)


def locate(config: DataConfig, synthetic_tables: Path) -> Inputs:
    """Finds and identifies all files.

    Args:
        config: the data section.
        synthetic_tables: the folder of `make_tables`, which stands for root and drugs there.

    Raises:
        DataError: if a file is missing.
        ConfigError: if there is no table of interactions, or none of NDCs where they are used.
    """
    names_of = reading.identify(Path(config.names).expanduser()) if config.names else None
    if config.source == "synthetic":
        folder = synthetic_tables
        found = mimic3.locate(folder, laboratory=config.cohort.max_laboratory > 0)
        return Inputs(folder, found, drugs.locate(folder / "drugs"), names_of)
    if config.root is None:
        raise ConfigError(
            f"data.root: expected where the {config.source} tables are, got null; give "
            "data.root=FOLDER (make demo: ROOT=FOLDER)"
        )
    root = Path(config.root).expanduser()
    found = _adapter(config).locate(root, laboratory=config.cohort.max_laboratory > 0)
    return Inputs(root, found, _locate_drugs(config), names_of)


def make_cohort(config: DataConfig, inputs: Inputs, folder: Path, force: bool) -> dict[str, Any]:
    """Reads, applies the protocol and writes the cohort folder, unless it is there already.

    Returns:
        The report of the manifest: "files", "dropped", "summary".

    Raises:
        DataError: if a table cannot be used or no patients are left.
    """
    settings = {"source": config.source, **dataclasses.asdict(config.cohort)}
    if config.source == "tables":
        settings["systems"] = dataclasses.asdict(config.systems)
    settings["molecules"] = config.molecules
    wanted = artifacts.fingerprint("cohort", inputs.fingerprints(), settings)
    if console.is_done(folder, "cohort", wanted, force):
        return artifacts.read_manifest(folder, "cohort").report
    if config.molecules:
        molecules.require_rdkit()
    console.say("cohort", f"reading {config.source} tables from {inputs.root}")
    records = _read(config, inputs)
    knowledge = drugs.read(inputs.drugs)
    console.say("cohort", f"applying the protocol {config.cohort.protocol}")
    with console.counter("making the cohort", 1) as done:
        made, dropped = protocols.build(records, knowledge, config.cohort)
        done()
    files = [*records.files, *knowledge.files]
    del records  # laboratory events come in their place
    if config.cohort.max_laboratory:
        made = _with_laboratory(config, inputs, made, files, dropped)
    if config.molecules:
        made = _with_molecules(made, knowledge, dropped)
    if inputs.names:
        given, file, lost = names.read(inputs.names, made.vocabularies)
        files.append(file)
        dropped += lost
        made = dataclasses.replace(made, names=given)
    with artifacts.new_folder(folder, "cohort", inputs.fingerprints(), settings, private=True) as (
        partial,
        report,
    ):
        cohort.write(made, partial)
        report.update(_report(made, files, dropped))
    return report


def describe(report: Mapping[str, Any]) -> str:
    """Writes a cohort's report as a short table."""
    numbers = report["summary"]
    split = ", ".join(f"{count} {name}" for name, count in numbers["split"].items())
    lines = [
        f"patients       {numbers['patients']:,} ({split})",
        f"visits         {numbers['visits']:,}",
        f"{'kind':<15}{'codes':>8}{'a visit':>10}{'most':>8}",
    ]
    for kind, mean in numbers["codes_per_visit"].items():
        codes = numbers["codes"].get(kind, numbers["codes"]["medication"])
        lines.append(f"  {kind:<13}{codes:>8,}{mean:>10.2f}{numbers['most_codes'][kind]:>8}")
    lines.append(
        f"DDI            {numbers['ddi_pairs']:,} pairs; rate {numbers['ddi_rate']:.4f} among the "
        "true sets"
    )
    if "laboratory" in numbers:
        of = numbers["laboratory"]
        lines.append(
            f"laboratory     {of['items']:,} items; {of['values_per_visit']:.2f} values a visit, "
            f"{of['visits_without']:,} visits without"
        )
    if "molecules" in numbers:
        of = numbers["molecules"]
        lines.append(
            f"molecules      {of['molecules']:,}; {of['medications']:,} medications have one"
        )
    if "names" in numbers:
        named = ", ".join(f"{count:,} {kind}" for kind, count in numbers["names"].items())
        lines.append(f"names          {named}")
    if numbers["empty_targets"]:
        lines.append(f"no target      {numbers['empty_targets']:,} visits")
    lines.append(f"{'rows read':<44}{'rows':>12}")
    lines += [f"  {file['name']:<42}{file['rows']:>12,}" for file in report["files"]]
    lines.append(f"{'rows dropped':<44}{'rows':>12}")
    for row in report["dropped"]:
        if row["rows"]:
            lines.append(f"  {row['table']:<14}{row['reason']:<44}{row['rows']:>12,}")
    return "\n".join(lines)


def _read(config: DataConfig, inputs: Inputs) -> Records:
    if config.source == "tables":
        return tables.read(inputs.root, config.systems, inputs.tables)
    if config.source == "mimic4":
        return mimic4.read(inputs.root, inputs.tables)
    return mimic3.read(inputs.root, inputs.tables)


def _adapter(config: DataConfig) -> ModuleType:
    return {"mimic4": mimic4, "tables": tables}.get(config.source, mimic3)


def _with_laboratory(
    config: DataConfig,
    inputs: Inputs,
    made: Cohort,
    files: list[SourceFile],
    dropped: list[Dropped],
) -> Cohort:
    table: LaboratoryTable = _adapter(config).LABORATORY
    console.say("cohort", f"reading laboratory events from {inputs.tables[table.name].path}")
    measured = laboratory.read(
        inputs.tables[table.name],
        table,
        made.visit_ids,
        made.admitted,
        config.cohort.target_window_h,
    )
    files.append(measured.file)
    added, lost = protocols.with_laboratory(made, measured, config.cohort.max_laboratory)
    dropped += lost
    return added


def _with_molecules(made: Cohort, knowledge: DrugKnowledge, dropped: list[Dropped]) -> Cohort:
    assert knowledge.molecules is not None, "locate has found the table"
    found, lost = molecules.canonical(knowledge.molecules, made.vocabularies["medication"])
    dropped += lost
    return dataclasses.replace(made, molecules=found)


def _locate_drugs(config: DataConfig) -> dict[str, InputFile]:
    given = {
        name: None if path is None else Path(path).expanduser()
        for name, path in (
            ("ndc_to_atc", config.ndc_to_atc),
            ("ddi", config.ddi),
            ("smiles", config.smiles),
        )
    }
    folder = None if config.drugs is None else Path(config.drugs).expanduser()
    found = drugs.locate(folder, **given)
    if config.molecules and "smiles" not in found:
        raise ConfigError(
            "data.molecules: expected atc3_smiles.csv in data.drugs (or data.smiles, a single "
            "file), got neither; docs/data.md says where to get it"
        )
    in_ndc = config.source != "tables" or config.systems.medication == "ndc"
    if in_ndc and "ndc_to_atc" not in found:
        where = "data.ndc_to_atc" if folder is None else str(folder)
        raise ConfigError(
            f"{where}: expected ndc_to_atc3.csv or ndc_to_atc3.csv.gz, because medications are in "
            "NDC, found none; docs/data.md says where to get it"
        )
    return found


def _report(made: Cohort, files: list[SourceFile], dropped: list[Dropped]) -> dict[str, Any]:
    return {
        "files": [
            {"name": f.path.name, "sha256": f.sha256, "bytes": f.num_bytes, "rows": f.num_rows}
            for f in files
        ],
        "dropped": [{"table": d.table, "reason": d.reason, "rows": d.num_rows} for d in dropped],
        "summary": protocols.summary(made),
    }
