#!/usr/bin/env python3
"""Serves the version that the registry's alias stands for, over HTTP.

    python jobs/deploy.py                               # on this machine, until Ctrl-C
    python jobs/deploy.py once=true http.port=0         # one example request, then shut down
    python jobs/deploy.py serve.alias=3 http.port=8080  # version 3, another port
    ray job submit --working-dir . -- python jobs/deploy.py name=mimic3   # on a cluster; returns

Sends one example request about nobody and writes it with its answer to
ROOT/experiments/NAME/deploy.json. On a cluster the application stays when the job ends;
`serve shutdown` takes it down.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from cafemed import artifacts, client, config, console, invocation, paths, registry
from cafemed.errors import ConfigError
from serve.settings import DeployConfig

if TYPE_CHECKING:
    from cafemed.bundle import Bundle


@hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name="deploy")
def main(cfg: DictConfig) -> None:
    """Finds the promoted version, checks that its bundle works, and serves it."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    sections = ("once", "http", "serve")
    with invocation.job(values, sections) as told:
        own = {key: values[key] for key in sections}
        settings = config.from_mapping(DeployConfig, own, "")
        console.say("deploy", str(registry.resolve(told.registry, settings.serve.alias)))
        settings = guarded(settings, told)
        run(told.registry, settings, told.experiment / "deploy.json")


def guarded(settings: DeployConfig, told: invocation.Invocation) -> DeployConfig:
    """Refuses to serve others without keys, or with a certificate or keys that are of no use."""
    from serve import access, launch, tls

    tls.require_usable(settings.http)
    served = dataclasses.replace(
        settings.serve,
        access=access.with_keys_file(settings.serve.access, told.root, told.name),
    )
    access.require_guarded(settings.http.host, served.access)
    if settings.once and not launch.can_ask(served.access):
        raise ConfigError(
            f"once=true asks one request: set {client.KEY_VARIABLE} to one of the API keys"
        )
    return dataclasses.replace(settings, serve=served)


def run(registry_dir: registry.Location, settings: DeployConfig, report: Path) -> None:
    """Serves a registry: once, until Ctrl-C, or on the cluster from now on."""
    # Here, because these take seconds to import and --help should not.
    from serve import launch

    if not launch.on_cluster():
        port = launch.usable_port(settings.http)
        settings = dataclasses.replace(settings, http=dataclasses.replace(settings.http, port=port))

    from serve import app
    from serve.recommender import Recommender

    # A bundle that does not work is refused here, in one line; only replicas make do with another.
    version = registry.resolve_version(registry_dir, settings.serve.alias)
    served = Recommender.load(registry.resolve(registry_dir, version), version).bundle
    started = time.monotonic()
    application = app.application(registry_dir, settings.serve)
    with launch.running(application, app.APPLICATION, settings) as url:
        console.say("deploy", f"answers at {url} after {time.monotonic() - started:.1f} s")
        if launch.can_ask(settings.serve.access):
            ask(url, served, report, settings)
        else:
            console.say("request", f"none is sent: {client.KEY_VARIABLE} is not set")
        if launch.on_cluster():
            console.say("deploy", f"{app.APPLICATION} stays on the cluster")
        elif not settings.once:
            console.say("deploy", f"serving until Ctrl-C; {url}/openapi.json describes the routes")
            launch.wait_for_stop()


def ask(url: str, served: "Bundle", report: Path, settings: DeployConfig) -> None:
    """Sends one request about nobody; prints it and its answer and writes both."""
    from serve import example, launch, tls

    request = example.example_request(served)
    started = time.monotonic()
    answer = launch.ask(url, request, verify=tls.trusted(settings.http))
    took_ms = 1000 * (time.monotonic() - started)
    for line in example.describe(request, answer):
        console.say("request", line)
    content = {"url": url, "took_ms": took_ms, "request": request, "answer": answer}
    report.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_text(report, json.dumps(content, indent=1) + "\n")
    console.say("request", f"answered in {took_ms:.0f} ms; in full: {report}")


if __name__ == "__main__":
    main()
