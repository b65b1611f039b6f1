"""TensorBoard's event files, read back with the field's own format and not with what wrote them."""

import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import RecordWriter

from cafemed import event_files
from cafemed.event_files import EventFile

PARAMETERS = {"train.learning_rate": 0.01, "model.gate": "visit", "model.layers": [1, 2], "n": None}


def file_in(folder: Path) -> Path:
    """The one file that has something in it."""
    (path,) = [path for path in folder.iterdir() if path.stat().st_size]
    return path


def events_in(folder: Path) -> list[Event]:
    """Every event of a folder; each checksum is compared with its definition."""
    path = file_in(folder)
    assert path.name.startswith("events.out.tfevents.")
    data, place, found = path.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        content = data[place + 12 : place + 12 + length]
        for part, at in ((data[place : place + 8], place + 8), (content, place + 12 + length)):
            x = crc32c(part)
            masked = (((x >> 15) | (x << 17)) + 0xA282EAD8) & 0xFFFFFFFF
            assert struct.unpack_from("<I", data, at) == (masked,)
        found.append(Event.FromString(content))
        place += length + 16
    return found


def scalars_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events_in(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def steps_in(folder: Path) -> list[int]:
    return [step for step, _ in scalars_in(folder)["validation/jaccard"]]


@pytest.fixture
def history(sweeps: Any) -> list[dict[str, Any]]:
    return sweeps.history_of({"train.learning_rate": 0.01}, 6)


def test_every_epoch_is_there_with_its_losses_and_metrics(tmp_path: Path, history: list[Any]):
    file = EventFile(tmp_path)
    for epochs in (1, 2, 2, 5, 6):
        file.follow(history[:epochs])
        assert steps_in(tmp_path) == list(range(1, epochs + 1))
    found = scalars_in(tmp_path)
    for number, epoch in enumerate(history):
        for name, value in epoch["losses"].items():
            assert found[f"train/{name}"][number] == (number + 1, pytest.approx(value))
        for name, value in epoch["metrics"].items():
            assert found[f"validation/{name}"][number] == (number + 1, pytest.approx(value))
    assert events_in(tmp_path)[0].file_version == "brain.Event:2"


def test_the_end_has_the_parameters_and_the_best_epoch(tmp_path: Path, history: list[Any]):
    history[2]["metrics"]["jaccard"] = 0.99
    EventFile(tmp_path).end(history, PARAMETERS, failed=True)
    assert scalars_in(tmp_path)["best/jaccard"] == [(3, pytest.approx(0.99))]
    plugins = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events_in(tmp_path)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    }
    begun = plugins["_hparams_/session_start_info"].session_start_info.hparams
    assert begun["train.learning_rate"].number_value == 0.01
    assert begun["model.gate"].string_value == "visit"
    assert begun["model.layers"].string_value == "[1, 2]"
    assert "n" not in begun
    about = plugins["_hparams_/experiment"].experiment
    assert "best/jaccard" in {metric.name.tag for metric in about.metric_infos}
    status = plugins["_hparams_/session_end_info"].session_end_info.status
    assert status == 2  # STATUS_FAILURE


def test_an_end_without_an_epoch(tmp_path: Path):
    EventFile(tmp_path).end([], PARAMETERS, failed=True)
    assert scalars_in(tmp_path) == {}
    assert len(events_in(tmp_path)) == 4


@pytest.mark.parametrize("back_to", [0, 2, 4, 5])
def test_a_run_that_goes_on_has_no_step_twice(tmp_path: Path, history: list[Any], back_to: int):
    EventFile(tmp_path).follow(history[:4])
    times = [event.wall_time for event in events_in(tmp_path) if event.step and event.summary.value]
    again = EventFile(tmp_path)  # as another process, from a checkpoint
    again.follow(history[:back_to])
    assert steps_in(tmp_path) == list(range(1, back_to + 1)) if back_to else True
    again.follow(history[: back_to + 1])
    again.end(history, PARAMETERS)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]
    kept = min(back_to, 4)
    now = [event.wall_time for event in events_in(tmp_path) if event.step and event.summary.value]
    assert now[:kept] == times[:kept]  # they are not written anew


def test_an_ended_run_is_ended_once(tmp_path: Path, history: list[Any]):
    EventFile(tmp_path).end(history, PARAMETERS)
    path = file_in(tmp_path)
    before = path.read_bytes()
    EventFile(tmp_path).end(history, PARAMETERS)
    file = EventFile(tmp_path)
    file.end(history, PARAMETERS)
    file.end(history, PARAMETERS)
    assert path.read_bytes() == before
    more = [*history, {**history[-1], "epoch": 7}]  # a finished one that was asked for more
    EventFile(tmp_path).end(more, PARAMETERS)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    ends = [v.tag for e in events_in(tmp_path) for v in e.summary.value if "session_end" in v.tag]
    assert len(ends) == 1


@pytest.mark.parametrize("lost", [1, 20, 300])
def test_half_a_record_is_dropped(tmp_path: Path, history: list[Any], lost: int):
    EventFile(tmp_path).follow(history[:4])
    path = file_in(tmp_path)
    path.write_bytes(path.read_bytes()[:-lost])
    assert len(list(event_files.read(path))) <= 5
    EventFile(tmp_path).follow(history[:5])
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


def test_what_is_written_anew_takes_the_old_ones_place_in_a_running_tensorboard(
    tmp_path: Path, history: list[Any]
):
    EventFile(tmp_path).follow(history[:4])
    before = file_in(tmp_path)
    EventFile(tmp_path).follow(history[:2])
    after = file_in(tmp_path)
    assert after.name > before.name  # TensorBoard reads files in the order of their names
    assert before.exists()  # and does not get past one that is gone
    restart = events_in(tmp_path)[1]
    assert (restart.step, restart.session_log.status) == (1, 1)  # START: forget from step 1 on


def test_a_record_is_what_tensorboards_own_writer_writes(tmp_path: Path, history: list[Any]):
    EventFile(tmp_path / "run").follow(history[:3])
    writer = RecordWriter(str(tmp_path / "other"))
    for event in events_in(tmp_path / "run"):
        writer.write(event.SerializeToString())
    writer.flush()
    writer.close()
    path = file_in(tmp_path / "run")
    assert path.read_bytes() == (tmp_path / "other").read_bytes()
