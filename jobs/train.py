#!/usr/bin/env python3
"""Trains one model on an experiment's cohort and graph.

    python jobs/train.py
    python jobs/train.py train.learning_rate=0.002 train.epochs=20
    python jobs/train.py model=cafemed model.use_charm=false name=ablation
    python jobs/train.py num_workers=2
    python jobs/train.py tracking=mlflow tracking.uri=http://tracking.example:5000
    ray job submit --working-dir . -- python jobs/train.py

Reads ROOT/experiments/NAME/cohort and /graph (of prepare.py and discover.py) and writes
ROOT/experiments/NAME/fit. Run again after an interruption, with the same configuration, it goes on
from the last whole epoch and ends with the same weights. A run whose inputs and configuration are
unchanged is skipped. `tensorboard --logdir ROOT/experiments/NAME/tensorboard` follows it, and with
`tracking=mlflow` it is a run there. Several workers train on the cluster at RAY_ADDRESS, or on a
Ray that is started for them.
"""

import shutil
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from cafemed import artifacts, config, console, invocation, paths

SECTIONS = ("model", "train", "calibration", "tracking", "device", "num_workers", "tensorboard")


@hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name="train")
def main(cfg: DictConfig) -> None:
    """Runs the stage."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    with invocation.job(values, SECTIONS) as told:
        run(told, values)


def run(told: invocation.Invocation, values: dict[str, Any]) -> None:
    """Loads, trains, measures, writes and reports."""
    import models  # torch takes seconds to import: not for --help
    from cafemed import calibration, experiment, fits, training
    from cafemed.calibration import CalibrationConfig
    from cafemed.cohort import SPLITS
    from cafemed.fit_tracking import FitTracking

    folder = told.experiment
    options = dict(values["model"])
    name = options.pop("name")
    models.check_options(name, options)
    fit_config = config.from_mapping(training.FitConfig, values["train"], "train")
    calibrated = config.from_mapping(CalibrationConfig, values["calibration"], "calibration")
    together = config.from_mapping(fits.Together, {"num_workers": values["num_workers"]}, "")
    device = training.choose_device(together.here(values["device"]))
    events = {"tensorboard": config.checked(bool, values["tensorboard"], "tensorboard")}
    settings = {
        "model": {"name": name, "options": options},
        **{section: values[section] for section in ("train", "calibration")},
        **together.settings(),
    }

    # 1) Skip what is done.
    sources = experiment.read_sources(folder)
    wanted = artifacts.fingerprint(fits.STAGE, sources, settings)
    target, checkpoint = folder / "fit", folder / "checkpoints" / f"fit-{wanted[:16]}"
    tracked = FitTracking(values["tracking"] | events, told, settings, sources, wanted)
    if console.is_done(target, fits.STAGE, wanted, told.force):
        tracked.finish(target)
        return
    if told.force:
        shutil.rmtree(checkpoint, ignore_errors=True)
    elif checkpoint.exists():
        console.say("train", f"going on from the checkpoint in {checkpoint}")
    tracked.require_ready(checkpoint)

    # 2) Train.
    given = experiment.load_inputs(folder)
    patients = {split: given.cohort.patients_of(split) for split in SPLITS}
    console.say(
        "train",
        f"{name} {together.describe(device)}: {len(patients['train'])} training and "
        f"{len(patients['validation'])} validation patients",
    )
    with tracked.following(checkpoint) as tell:

        def after_epoch(report: training.EpochReport) -> None:
            console.say("epoch", str(report))
            tell(report)

        result = fits.train(
            models.build,
            name,
            options,
            given.inputs,
            given.arrays,
            patients,
            fit_config,
            on_epoch=after_epoch,
            checkpoint_dir=checkpoint,
            device=device if together.num_workers == 1 else values["device"],
            num_workers=together.num_workers,
        )

        # 3) Calibrate and measure the best epoch, write, report.
        model = models.build(name, given.inputs, options, fit_config.seed).to(device)
        model.load_state_dict(result.weights)
        predictions = fits.predict(model, given.arrays, patients, device)
        decision = calibration.choose(predictions["validation"], calibrated, fit_config.threshold)
        measured = fits.measure(predictions, given.inputs.ddi, decision, fit_config.seed)
        fits.write(target, given.sources, settings, result, measured)
    shutil.rmtree(checkpoint, ignore_errors=True)
    tracked.finish(target)
    console.say("train", f"best epoch {result.best_epoch} of {len(result.history)}")
    print(fits.describe(measured))
    console.say("done", str(target))


if __name__ == "__main__":
    main()
