"""The command that trains a trial of a sweep again.

Every known option is spelled out, so that the command means the same when a default has changed.
"""

import re
import shlex
from collections.abc import Mapping
from typing import Any

#: Text that Hydra reads as itself without quotes; numbers, null and the like are not.
_PLAIN = re.compile(r"(?!(null|true|false|nan|inf)$)[A-Za-z_][\w.-]*", re.ASCII | re.IGNORECASE)


def configuration(
    settings: Mapping[str, Any],
    parameters: Mapping[str, Any],
    seed: int,
    epochs: int | None = None,
    gpus: float = 0.0,
) -> dict[str, Any]:
    """What a trial was trained with.

    Args:
        settings: of the sweep, `SweepPlan.settings()`.
        parameters: of the trial, "train.learning_rate" → value; "model.NAME.OPTION" is an option
            that only this model has.
        seed: of the trial.
        epochs: after how many the scheduler stopped it; None where it did not.
        gpus: reserved for it; not of the settings, as they may change while a sweep goes on.

    Returns:
        "model": "name" and all its options (of a model that is not the configured one, in a sweep
        whose settings do not have "models" yet, only those that the trial varied); "train": all
        settings of training; "calibration", if the settings have it; "device"; "num_workers", if
        there were several.
    """
    varied: dict[str, dict[str, Any]] = {"model": {}, "train": {}}
    for parameter, value in parameters.items():
        section, *_, option = parameter.split(".")
        varied[section][option] = value
    configured = settings["model"]
    name = varied["model"].pop("name", configured["name"])
    # The options that trials of this model began with; of another model, they are its own.
    own = name == configured["name"]
    options = configured["options"] if own else settings.get("models", {}).get(name, {})
    train = {**settings["train"], **varied["train"], "seed": seed}
    if epochs is not None:
        train["epochs"] = epochs
    # What is chosen after training, such as the temperature, is no trial's own.
    others = {key: settings[key] for key in ("calibration",) if key in settings}
    # A trial without a GPU of its own trains on the CPU, also where there is a GPU.
    others["device"] = "auto" if gpus > 0 else "cpu"
    if (workers := settings.get("search", {}).get("num_workers", 1)) > 1:
        others["num_workers"] = workers
    model = {"name": name, **options, **varied["model"]}
    return {"model": model, "train": train, **others}


def command(name: str, configured: Mapping[str, Any], root: str | None = None) -> list[str]:
    """The command line of `jobs/train.py`, argument by argument, each quoted for a POSIX shell.

    Args:
        name: of the experiment.
        configured: of `configuration`.
        root: `paths.root`, where it was given.
    """
    overrides = {"name": name, "model": configured["model"]["name"]}
    if root is not None:
        overrides["paths.root"] = root
    for section, options in configured.items():
        if not isinstance(options, Mapping):
            overrides[section] = options
            continue
        overrides |= {
            f"{section}.{option}": value
            for option, value in options.items()
            if (section, option) != ("model", "name")
        }
    arguments = [f"{key}={hydra_value(value)}" for key, value in overrides.items()]
    return [shlex.quote(part) for part in ("python", "jobs/train.py", *arguments)]


def hydra_value(value: Any) -> str:
    """A value as Hydra's override grammar reads it back, of the same type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{hydra_value(k)}:{hydra_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(hydra_value(item) for item in value) + "]"
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    # Backslashes count only before what they can escape: the quote, and "${" of interpolations.
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', escaped)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return '"' + escaped + "\\" * trailing + '"'
