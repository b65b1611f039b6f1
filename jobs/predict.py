#!/usr/bin/env python3
"""Recommends medications for all patients of a file, with the numbers that the endpoint gives.

    python jobs/predict.py predict.input=/data/patients.parquet predict.output=/data/answers.parquet
    python jobs/predict.py predict.input=… predict.output=… predict.workers=8
    python jobs/predict.py name=mimic3 predict.alias=3 predict.probabilities=true predict.input=… …

Reads a Parquet file of patients (serve/patient_tables.py says which columns), or the cohort folder
that the model was trained on, and writes a Parquet file that only its owner may read: each
patient's recommended medications with their probabilities. With RAY_ADDRESS, and in a submitted
job, the work is done on that cluster, whose nodes must see both paths.
"""

import time
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from cafemed import console, invocation, paths, registry


@hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name="predict")
def main(cfg: DictConfig) -> None:
    """Runs the job."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    with invocation.job(values, ("predict",)) as told:
        run(told, values["predict"])


def run(told: invocation.Invocation, section: dict[str, Any]) -> None:
    """Loads the model, scores the input, and says how long it took."""
    import torch  # takes seconds to import: not for --help

    from cafemed import cluster, config
    from cafemed.errors import ConfigError
    from serve import prediction
    from serve.recommender import Recommender

    settings = config.from_mapping(prediction.PredictConfig, section, "predict")
    source, target = prediction.checked_paths(settings)
    if target.exists() and not told.force:
        raise ConfigError(f"predict.output: {target} is there already; force=true replaces it")
    version = registry.resolve_version(told.registry, settings.alias)
    folder: Path = registry.resolve(told.registry, version)
    console.say("predict", f"version {version:04d} ({settings.alias}) of {told.registry}")
    torch.set_num_threads(1)  # as a replica; steps this small are slower on more
    recommender = Recommender.load(folder, version)
    prediction.open_source(source, recommender, settings.batch_size)  # refused before Ray starts
    if settings.workers == 0:
        started = time.monotonic()
        number = prediction.predict(recommender, settings)
    else:
        with cluster.ray_cluster(settings.workers * settings.num_cpus) as where:
            console.say("predict", where)
            reserved = {"CPU": ("predict.num_cpus", settings.num_cpus)}
            cluster.require_resources("a worker", reserved)
            started = time.monotonic()
            number = prediction.predict_on_ray(recommender, folder, settings)
    took_s = time.monotonic() - started
    rate = number / took_s
    console.say("predict", f"{number:,} patients in {took_s:.1f} s, {rate:,.0f} a second")
    console.say("done", str(target))


if __name__ == "__main__":
    main()
