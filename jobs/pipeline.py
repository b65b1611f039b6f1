#!/usr/bin/env python3
"""Runs prepare, discover, tune, evaluate and deploy in order, and ends with a summary.

    python jobs/pipeline.py --config-name demo          # small synthetic cohort, a minute or two
    python jobs/pipeline.py data=mimic3 data.root=/tables data.drugs=/drugs
    ray job submit --working-dir . -- python jobs/pipeline.py --config-name demo

Each stage is its own job in its own process, with its configuration written to
`<root>/experiments/<name>/pipeline/<job>.yaml`: run one again with
`python jobs/<job>.py --config-path <that folder> --config-name <job>`.
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra import compose
from omegaconf import DictConfig, OmegaConf

from cafemed import artifacts, console, invocation, paths, summary
from serve import example

STAGES = ("prepare", "discover", "tune", "evaluate", "deploy")
JOBS_DIR = Path(__file__).resolve().parent
#: Seconds that an interrupted stage has for shutting its cluster down.
GRACE_S = 60


@hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name="pipeline")
def main(cfg: DictConfig) -> None:
    """Writes each job's configuration, runs the jobs, prints the summary."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    with invocation.job(values, sections()) as told:
        conf_dir = write_configs(cfg, told)
        started = time.monotonic()
        for number, job in enumerate(STAGES, 1):
            console.say(job, f"stage {number} of {len(STAGES)}")
            began = time.monotonic()
            run_job(job, conf_dir)
            console.say(job, f"done in {time.monotonic() - began:.1f} s")
        took_s = time.monotonic() - started
        asked = json.loads((told.experiment / "deploy.json").read_text())
        request = example.describe(asked["request"], asked["answer"])
        summary.show(told.experiment, told.registry, request, took_s)


def sections() -> list[str]:
    """The keys that a pipeline may have: its jobs' keys, and for each job a section of its own."""
    keys = {str(key) for job in STAGES for key in compose(config_name=job)}
    common = {field.name for field in dataclasses.fields(invocation.Common)}
    return [*sorted(keys - common), *STAGES]


def write_configs(cfg: DictConfig, told: invocation.Invocation) -> Path:
    """Gives each job the keys of this configuration that its own configuration has."""
    folder = told.experiment / "pipeline"
    folder.mkdir(parents=True, exist_ok=True)
    hydra_section = OmegaConf.load(paths.CONF_DIR / "base.yaml").hydra
    for job in STAGES:
        own = compose(config_name=job)
        OmegaConf.set_struct(own, False)
        shared = {key: cfg[key] for key in own if key in cfg}
        merged = OmegaConf.create({**own, **shared, "name": told.name})
        plain: Any = OmegaConf.to_container(OmegaConf.merge(merged, cfg.get(job, {})), resolve=True)
        plain["paths"]["root"] = str(told.root)
        plain["hydra"] = OmegaConf.to_container(hydra_section)
        artifacts.write_text(folder / f"{job}.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
    return folder


def run_job(job: str, conf_dir: Path) -> None:
    """Runs one job to its end; on an interrupt, lets it shut down before going on.

    Raises:
        SystemExit: with the job's status, if it failed.
    """
    command = [sys.executable, str(JOBS_DIR / f"{job}.py")]
    command += ["--config-path", str(conf_dir), "--config-name", job]
    # Its own session: a terminal's Ctrl-C reaches the job once, from here.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait()
    except BaseException:
        process.terminate()  # as Ctrl-C to the job, and heard also where SIGINT is ignored (nohup)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        if process.poll() is None:
            process.kill()
        raise
    if status:
        print(f"error: stage {job} failed with status {status}", file=sys.stderr, flush=True)
        raise SystemExit(status if status > 0 else 1)


if __name__ == "__main__":
    main()
