"""TensorBoard's event files of training runs: every epoch once, however often one was interrupted.

An event file is a row of records, each a length, its checksum, a protocol buffer `Event` and its
checksum (tensorflow/core/lib/io/record_writer.h); only the protocol buffers are taken from
tensorboardX, whose writer starts a thread a file and cannot go on with one.
"""

import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.proto.api_pb2 import Status
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.record_writer import masked_crc32c

_PATTERN = "events.out.tfevents.*"
_VERSION = "brain.Event:2"
_HPARAMS = "_hparams_/"
_END = f"{_HPARAMS}session_end_info"


def scalars(epoch: Mapping[str, Any]) -> dict[str, float]:
    """Tag → value of an epoch (`training.EpochReport.as_dict`): "train/loss", "time/epoch_s" …"""
    found = {f"train/{name}": float(value) for name, value in epoch["losses"].items()}
    found |= {f"validation/{name}": float(value) for name, value in epoch["metrics"].items()}
    return found | {"time/epoch_s": float(epoch["seconds"])}


def best_scalars(history: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], int]:
    """Tag → validation metric of the epoch with the best Jaccard, and which one that is; {}, 0."""
    best = max(history, key=lambda epoch: float(epoch["metrics"]["jaccard"]), default=None)
    if best is None:
        return {}, 0
    found = {f"best/{name}": float(value) for name, value in best["metrics"].items()}
    return found, int(best["epoch"])


class EventFile:
    """The event file of one training run.

    Args:
        folder: of the run; it is made when there is something to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path: Path | None = None
        self._epochs = 0
        self._ended = False

    def follow(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Writes the epochs that the file does not have.

        Args:
            history: of the run, from its first epoch on.

        Raises:
            OSError: if the file cannot be written; the next call reads it again.
        """
        new = self._opened(history)[self._epochs :]
        events = [_scalar_event(scalars(epoch), int(epoch["epoch"])) for epoch in new]
        self._append(events)
        self._epochs += len(new)

    def end(
        self,
        history: Sequence[Mapping[str, Any]],
        parameters: Mapping[str, Any],
        failed: bool = False,
    ) -> None:
        """Writes the epochs that are missing, the best one and the parameters, for HPARAMS.

        Args:
            history: of the run, all of it.
            parameters: name → value; None is left out, what is no number, text or bool is text.
            failed: whether it ended by an error.

        Raises:
            OSError: as `follow`.
        """
        self.follow(history)
        if self._ended:
            return
        best, step = best_scalars(history)
        plain = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in parameters.items()
            if value is not None
        }
        about, begun, _ = summary.hparams(plain, best)
        over = HParamsPluginData(
            session_end_info=SessionEndInfo(
                status=Status.Value("STATUS_FAILURE" if failed else "STATUS_SUCCESS")
            )
        )
        plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=over.SerializeToString())
        metadata = SummaryMetadata(plugin_data=plugin)
        last = Summary(value=[Summary.Value(tag=_END, metadata=metadata)])
        events = [_scalar_event(best, step)] if best else []
        events += [Event(wall_time=time.time(), summary=part) for part in (about, begun, last)]
        self._append(events)
        self._ended = True

    def _opened(self, history: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Makes the file one of `history`, if that is not known of it yet."""
        if self._path is None:
            self._open(len(history))
        return history

    def _open(self, epochs: int) -> None:
        """Goes on with the file that is there, without what is not of the run's history.

        A process that dies may leave half a record, or epochs after the checkpoint from which the
        run goes on. A file with such an end is written anew under another name, which a
        TensorBoard that runs takes for a restart of the run; the old one stays, empty, as
        TensorBoard (2.21) does not get past one that is gone.
        """
        found = [path for path in sorted(self.folder.glob(_PATTERN)) if path.stat().st_size]
        events, whole = _read_all(found)
        ended = any(value.tag == _END for event in events for value in event.summary.value)
        steps = [event.step for event in events if _is_epoch(event)]
        complete = whole and steps == list(range(1, len(steps) + 1))
        if len(found) == 1 and complete and ended and len(steps) == epochs:
            self._path, self._epochs, self._ended = found[0], epochs, True
            return
        endings = any(not _is_epoch(event) and event.HasField("summary") for event in events)
        if len(found) == 1 and complete and not endings and len(steps) <= epochs:
            self._path, self._epochs, self._ended = found[0], len(steps), False
            return
        by_step = {event.step: event for event in events if _is_epoch(event)}
        kept = []
        for step in range(1, epochs + 1):
            if step not in by_step:
                break
            kept.append(by_step[step])
        self._begin(found, kept)

    def _begin(self, before: Sequence[Path], kept: Sequence[Event]) -> None:
        """Begins a file with these events, in place of those before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in self.folder.glob(_PATTERN)]
        latest = max((int(name.split(".")[3]) for name in names), default=0)
        stamp = max(int(time.time()), latest + 1)
        path = self.folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}"
        first = [Event(wall_time=time.time(), file_version=_VERSION)]
        if before:
            restart = SessionLog(status=SessionLog.START)
            first.append(Event(wall_time=time.time(), step=1, session_log=restart))
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(b"".join(_record(event) for event in (*first, *kept)))
        partial.replace(path)
        for old in before:
            os.truncate(old, 0)
        self._path, self._epochs, self._ended = path, len(kept), False

    def _append(self, events: Sequence[Event]) -> None:
        if not events:
            return
        assert self._path is not None
        path, self._path = self._path, None  # unknown, until it is written
        with path.open("ab") as file:
            file.write(b"".join(_record(event) for event in events))
        self._path = path


def read(path: Path) -> Iterator[Event]:
    """The events of a file, up to the first record that is cut off or damaged."""
    return iter(_read(path)[0])


def _read_all(paths: Sequence[Path]) -> tuple[list[Event], bool]:
    events: list[Event] = []
    whole = True
    for path in paths:
        found, intact = _read(path)
        events += found
        whole = whole and intact
    return events, whole


def _read(path: Path) -> tuple[list[Event], bool]:
    """The events of a file, and whether it ends with a whole one."""
    data, place, events = path.read_bytes(), 0, []
    while place + 12 <= len(data):
        length, check = struct.unpack_from("<QI", data, place)
        end = place + 12 + length
        if check != masked_crc32c(data[place : place + 8]) or end + 4 > len(data):
            break
        content = data[place + 12 : end]
        if struct.unpack_from("<I", data, end)[0] != masked_crc32c(content):
            break
        events.append(Event.FromString(content))
        place = end + 4
    return events, place == len(data)


def _record(event: Event) -> bytes:
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
    return b"".join((length, checks[0], content, checks[1]))


def _scalar_event(values: Mapping[str, float], step: int) -> Event:
    made = Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in values.items()])
    return Event(wall_time=time.time(), step=step, summary=made)


def _is_epoch(event: Event) -> bool:
    """Whether an event has an epoch's scalars, and not the parameters or the best ones."""
    return any(value.tag.startswith("train/") for value in event.summary.value)
