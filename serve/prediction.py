"""Batch scoring: the endpoint's numbers for many patients of a file, written to a file.

`predict` is one process; `predict_on_ray` shares a file's row groups among processes. A few
thousand patients are in memory at a time, however many the file holds.
"""

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cafemed import artifacts, cohort
from cafemed.config import Range
from cafemed.errors import ConfigError, DataError
from serve.bulk import Patients, Scorer
from serve.patient_tables import TableReader
from serve.recommender import Recommender
from serve.settings import MAX_UNKNOWN_SHARE

#: Column of what a worker gives in place of results.
_REFUSED = "refused"


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Settings of jobs/predict.py; spelled out in platform/conf/predict.yaml.

    Attributes:
        input: absolute path of a Parquet file (serve/patient_tables.py), or of a cohort folder that
            the model was trained on.
        output: absolute path of the Parquet file to write.
        alias: which version of the registry: "production", "candidate" or a number.
        probabilities: also write every medication's probability.
        max_unknown_share: a patient with a larger share of unknown codes gets no recommendation.
        batch_size: patients in memory at a time, of each process.
        workers: processes; 0: this one alone, without Ray.
        num_cpus: that a worker reserves of Ray.
    """

    input: str | None = None
    output: str | None = None
    alias: str | int = "production"
    probabilities: bool = False
    max_unknown_share: Annotated[float, Range(0, 1)] = MAX_UNKNOWN_SHARE
    batch_size: Annotated[int, Range(1, 1_000_000)] = 8192
    workers: Annotated[int, Range(0, 1024)] = 1
    num_cpus: Annotated[float, Range(0, open_low=True)] = 1.0


class Source(Protocol):
    """Where patients come from, in pieces that can be read apart from each other."""

    def pieces(self) -> list[int]:
        """Numbers of the pieces, in order."""

    def read(self, piece: int, size: int) -> Iterator[tuple[pa.Array, Patients]]:
        """At most so many patients at a time: their identifiers, and what is known of them."""


class ParquetSource:
    """A Parquet file; a piece is a row group."""

    def __init__(self, path: Path, recommender: Recommender) -> None:
        """Opens the file.

        Raises:
            DataError: if it is no Parquet file, or its schema is not one of patients.
        """
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as err:
            raise DataError(f"{path}: not a Parquet file ({type(err).__name__})") from err
        self._path = path
        self._reader = TableReader(recommender.encoder, recommender.bundle.preprocessing, str(path))
        self._reader.require_schema(self._file.schema_arrow)
        if not self._file.metadata.num_rows:
            raise DataError(f"{path}: holds no patient")

    def pieces(self) -> list[int]:
        """See Source."""
        return list(range(self._file.num_row_groups))

    def read(self, piece: int, size: int) -> Iterator[tuple[pa.Array, Patients]]:
        """See Source."""
        groups = self._file.metadata
        row = 1 + sum(groups.row_group(i).num_rows for i in range(piece))
        batches = self._file.iter_batches(size, row_groups=[piece])
        while True:
            try:
                batch = next(batches, None)
            except (OSError, pa.ArrowException) as err:
                raise DataError(f"{self._path}: damaged after row {row - 1}") from err
            if batch is None:
                return
            if len(batch):
                table = pa.Table.from_batches([batch])
                yield batch["patient"], self._reader.read(table, row)
            row += len(batch)


class CohortSource:
    """A cohort folder; a piece is so many patients."""

    def __init__(self, folder: Path, recommender: Recommender, size: int) -> None:
        """Loads the cohort.

        Raises:
            ArtifactError: if it is not whole, or not the one that the model was trained on.
        """
        self._cohort = found = cohort.load(folder)
        made_from = recommender.bundle.sources.get("cohort", "none")
        artifacts.require_match(str(folder), made_from, found.fingerprint)
        self._known, self._laboratory = found.known_inputs(), found.known_laboratory()
        self._size = size

    def pieces(self) -> list[int]:
        """See Source."""
        return list(range(-(-self._cohort.num_patients // self._size)))

    def read(self, piece: int, size: int) -> Iterator[tuple[pa.Array, Patients]]:
        """See Source."""
        whole = self._cohort
        first, stop = piece * self._size, min((piece + 1) * self._size, whole.num_patients)
        for start in range(first, stop, size):
            patients = np.arange(start, min(start + size, stop))
            offsets = whole.patient_offsets[patients[0] : patients[-1] + 2]
            visits = np.arange(offsets[0], offsets[-1])
            diagnoses, procedures, medications = (lists.take(visits) for lists in self._known)
            items = self._laboratory.items
            values = self._laboratory.values[
                items.offsets[visits[0]] : items.offsets[visits[-1] + 1]
            ]
            yield (
                pa.array([whole.patient_ids[p] for p in patients]),
                Patients(
                    offsets=offsets - offsets[0],
                    known=(diagnoses, procedures, medications),
                    sex=whole.sex[patients],
                    age=whole.age[offsets[1:] - 1],
                    laboratory=dataclasses.replace(
                        self._laboratory, items=items.take(visits), values=values
                    ),
                    unknown=np.zeros(len(patients), np.int64),
                    unknown_share=np.zeros(len(patients)),
                ),
            )


def open_source(path: Path, recommender: Recommender, size: int) -> Source:
    """Opens a Parquet file, or a cohort folder.

    Raises:
        DataError: if there is nothing, or not what it has to be.
        ArtifactError: as CohortSource.
    """
    if path.is_dir():
        return CohortSource(path, recommender, size)
    if not path.is_file():
        raise DataError(f"{path}: expected a Parquet file or a cohort folder, found none")
    return ParquetSource(path, recommender)


class Predictor:
    """Scores pieces of a source."""

    def __init__(self, recommender: Recommender, source: Source, config: PredictConfig) -> None:
        """Prepares what all pieces share."""
        self._source = source
        self._config = config
        self._scorer = Scorer(recommender)
        bundle = recommender.bundle
        self._threshold = bundle.preprocessing.threshold
        names = [code.partition(":") for code in bundle.vocabularies["medication"]]
        self._systems = pa.array([system for system, _, _ in names])
        self._codes = pa.array([code for _, _, code in names])
        self._ddi = bundle.ddi.astype(np.float32)

    def tables(self, piece: int) -> Iterator[pa.Table]:
        """The results of a piece, in the source's order."""
        for identifiers, patients in self._source.read(piece, self._config.batch_size):
            yield self._answers(identifiers, patients, self._scorer.probabilities(patients))

    def _answers(
        self, identifiers: pa.Array, patients: Patients, scores: NDArray[np.float32]
    ) -> pa.Table:
        # As Answerer.answer with no options: what reaches the threshold, the most probable first.
        refused = patients.unknown_share > self._config.max_unknown_share
        order = np.argsort(-scores, axis=1, kind="stable")
        number = np.where(refused, 0, np.count_nonzero(scores >= self._threshold, axis=1))
        is_chosen = np.arange(scores.shape[1]) < number[:, None]
        chosen = pa.array(order[is_chosen])
        medications = pa.StructArray.from_arrays(
            [
                self._systems.take(chosen),
                self._codes.take(chosen),
                pa.array(np.take_along_axis(scores, order, axis=1)[is_chosen]),
            ],
            names=["system", "code", "probability"],
        )
        offsets = pa.array(np.concatenate([[0], np.cumsum(number)]), pa.int32())
        rates = self._rates(scores >= self._threshold)
        columns = {
            "patient": identifiers,
            "medications": pa.ListArray.from_arrays(offsets, medications, mask=pa.array(refused)),
            "ddi_rate": pa.array(rates, mask=refused),
            "unknown_codes": pa.array(patients.unknown, pa.int32()),
        }
        if self._config.probabilities:
            columns["probabilities"] = pa.FixedSizeListArray.from_arrays(
                pa.array(scores.reshape(-1)), scores.shape[1], mask=pa.array(refused)
            )
        return pa.table(columns)

    def _rates(self, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        """As selection.rate of each row. Counts up to 2**24 are exact in single precision."""
        sets = chosen.astype(np.float32)
        interactions = ((sets @ self._ddi) * sets).sum(axis=1).astype(np.float64) / 2
        sizes = chosen.sum(axis=1)
        pairs = sizes * (sizes - 1) // 2
        return np.where(pairs > 0, interactions / np.maximum(pairs, 1), 0.0)


def predict(recommender: Recommender, config: PredictConfig) -> int:
    """Scores the input in this process, writes the output, and gives the number of patients.

    Raises:
        DataError: naming column and row of what is wrong; the output is then as it was.
        ConfigError: if the output cannot be written.
    """
    source_path, target = checked_paths(config)
    source = open_source(source_path, recommender, config.batch_size)
    predictor = Predictor(recommender, source, config)
    tables = (table for piece in source.pieces() for table in predictor.tables(piece))
    return write(target, tables, recommender)


def predict_on_ray(recommender: Recommender, folder: Path, config: PredictConfig) -> int:
    """As `predict`, with `config.workers` processes of the connected Ray.

    Args:
        recommender: of the folder; checks the input here, before a worker starts.
        folder: the bundle, and like the input seen by every node.
        config: see PredictConfig.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    source_path, target = checked_paths(config)
    source = open_source(source_path, recommender, config.batch_size)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells each step of its own work
    DataContext.get_current().execution_options.preserve_order = True
    DataContext.get_current().enable_progress_bars = False
    pieces = source.pieces()
    job = {"folder": str(folder), "version": recommender.name.version}
    told = json.dumps(job | {"config": dataclasses.asdict(config)})
    asked = ray.data.from_items(
        [{"piece": piece, "job": told} for piece in pieces], override_num_blocks=len(pieces)
    )
    answers = asked.map_batches(
        _Worker,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=config.num_cpus,
        compute=ActorPoolStrategy(size=min(config.workers, len(pieces))),
    )
    batches = answers.iter_batches(batch_size=None, batch_format="pyarrow")
    return write(target, map(_unrefused, batches), recommender)


class _Worker:
    """A process of `predict_on_ray`."""

    def __init__(self) -> None:
        self._predictor: Predictor | None = None

    def __call__(self, asked: pa.Table) -> Iterator[pa.Table]:
        try:
            for row in asked.to_pylist():
                self._predictor = self._predictor or self._prepared(**json.loads(row["job"]))
                yield from self._predictor.tables(row["piece"])
        except DataError as err:  # as a result: Ray would tell of an exception on many lines
            yield pa.table({_REFUSED: [str(err)]})

    def _prepared(self, folder: str, version: int, config: dict[str, Any]) -> Predictor:
        import torch

        torch.set_num_threads(1)
        settings = PredictConfig(**config)
        recommender = Recommender.load(Path(folder), version)
        source = open_source(Path(str(settings.input)), recommender, settings.batch_size)
        return Predictor(recommender, source, settings)


def _unrefused(table: pa.Table) -> pa.Table:
    """Raises in this process what a worker refused."""
    if table.column_names == [_REFUSED]:
        raise DataError(table[_REFUSED][0].as_py())
    return table


def checked_paths(config: PredictConfig) -> tuple[Path, Path]:
    """Input and output.

    Raises:
        ConfigError: if one is missing, relative, or the other.
    """
    found = []
    for key, text in (("input", config.input), ("output", config.output)):
        if text is None or not Path(text).is_absolute():
            raise ConfigError(f"predict.{key}: expected an absolute path, got {text}")
        found.append(Path(text))
    source, target = found
    if target.is_dir() or source.resolve() == target.resolve():
        raise ConfigError(f"predict.output: {target} is a folder or the input; choose another file")
    return source, target


def write(target: Path, tables: Iterable[pa.Table], recommender: Recommender) -> int:
    """Writes results as one Parquet file that only its owner may read; gives the number of rows.

    It is written beside the target and renamed when it is whole. The file's metadata says which
    model the results are of, and which medication each of its probabilities is of.

    Raises:
        ConfigError: if it cannot be written.
    """
    of = {
        "model": recommender.name.name,
        "version": str(recommender.name.version),
        "bundle": recommender.bundle.fingerprint,
        "medications": json.dumps(recommender.bundle.vocabularies["medication"]),
    }
    rows = 0
    with _beside(target) as partial, contextlib.ExitStack() as closing:
        writer: Any = None
        for table in tables:
            if writer is None:
                schema = table.schema.with_metadata(of)
                writer = closing.enter_context(pq.ParquetWriter(partial, schema))
            writer.write_table(table.cast(schema))
            rows += len(table)
    return rows


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # mkstemp makes a file of mode 0600.
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
    except OSError as err:
        raise ConfigError(f"predict.output: cannot write {target}: {err.strerror}") from err
    partial = Path(name)
    try:
        yield partial
        artifacts.sync(partial)
        partial.replace(target)
        artifacts.sync(target.parent)
    except OSError as err:
        raise ConfigError(f"predict.output: cannot write {target}: {err.strerror}") from err
    finally:
        partial.unlink(missing_ok=True)
