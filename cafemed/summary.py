"""The table at the end of a pipeline: what each stage made, and the answered request."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cafemed import artifacts

Row = tuple[str, str]


def rows(experiment: Path, registry: Path | str, request: Sequence[str]) -> list[Row]:
    """Reads the stages' reports of one experiment; no figure is computed here.

    Args:
        experiment: the folder with cohort, graph, sweep and evaluation.
        registry: where the experiment's models were published.
        request: lines that describe the request and its answer.

    Raises:
        ArtifactError: if a stage is missing.
    """
    return [
        *_cohort(artifacts.read_manifest(experiment / "cohort", "cohort").report["summary"]),
        *_graph(artifacts.read_manifest(experiment / "graph", "graph").report),
        *_sweep(artifacts.read_manifest(experiment / "sweep", "sweep").report),
        *_evaluation(artifacts.read_manifest(experiment / "evaluation", "evaluation").report),
        *(("" if i else "request", line) for i, line in enumerate(request)),
        ("files", str(experiment)),
        ("registry", str(registry)),
    ]


def show(experiment: Path, registry: Path | str, request: Sequence[str], seconds: float) -> None:
    """Prints the table; `seconds` is the time of the whole pipeline."""
    print()
    for name, text in rows(experiment, registry, request):
        print(f"{name:<12}{text}")
    print(f"{'time':<12}{seconds:.1f} s", flush=True)


def _cohort(found: dict[str, Any]) -> Iterator[Row]:
    split = ", ".join(f"{count} {name}" for name, count in found["split"].items())
    yield "data", f"{found['patients']:,} patients ({split}), {found['visits']:,} visits"
    codes = ", ".join(f"{count:,} {kind} codes" for kind, count in found["codes"].items())
    yield "", f"{codes}, {found['ddi_pairs']:,} interacting pairs"


def _graph(found: dict[str, Any]) -> Iterator[Row]:
    undirected = found["edges"] - found["directed_edges"]
    yield (
        "graph",
        f"{found['edges']:,} edges ({found['directed_edges']:,} directed, {undirected:,} not) "
        f"over {found['columns']:,} codes, learned in {found['blocks']} blocks",
    )


def _sweep(found: dict[str, Any]) -> Iterator[Row]:
    counts = ", ".join(
        f"{found[status]} {status}" for status in ("finished", "stopped", "failed") if found[status]
    )
    yield "sweep", f"{found['trials']} trials: {counts}"
    best = found["best"]
    validation = best["validation"]
    yield (
        "best trial",
        f"trial {best['trial']}: validation Jaccard {validation['jaccard']:.4f}, "
        f"DDI rate {validation['ddi_rate']:.4f}",
    )
    for name, value in best["parameters"].items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        yield "", f"{name}={shown}"


def _evaluation(found: dict[str, Any]) -> Iterator[Row]:
    test = found["model"]["test"]
    yield "test", _metrics(test["metrics"]) + f" ({test['patients']} patients)"
    for name, baseline in found["baselines"].items():
        yield "", _metrics(baseline["metrics"]) + f" ({name})"
    if "ceiling" in found:
        yield "", _metrics(found["ceiling"]["at_half"]) + " (best possible)"


def _metrics(found: dict[str, float]) -> str:
    return (
        f"Jaccard {found['jaccard']:.4f}  F1 {found['f1']:.4f}  PRAUC {found['prauc']:.4f}  "
        f"DDI {found['ddi_rate']:.4f}  medications {found['num_medications']:.1f}"
    )
