"""Runs one other package on one data set; started by `rivals.run` in that package's Python.

    .bench/xges/bin/python -P benchmarks/graphs/rival_process.py xges DATA.npz ANSWER.npz

Of the project it knows the two files only: the data (`planted.Planted`) and the answer. CPU
seconds are those of the search after the data are loaded and, where a package compiles itself,
after a run on a few columns. It needs numpy and the package, nothing of the project.
"""

import importlib
import importlib.metadata
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

#: Packages that decide what a search costs, named in the results where they are installed.
_SHOWN = ("gies", "causal-learn", "xges", "dowhy", "numpy", "numba", "pandas")


def gies(data: Any) -> Any:
    """`gies.fit_bic`: centres every environment on its own mean; all three phases."""
    package = importlib.import_module("gies")
    parts = [data["rows"][data["environments"] == e] for e in range(len(data["targets"]))]
    targets = [np.flatnonzero(hit).tolist() for hit in data["targets"]]
    return lambda: package.fit_bic(parts, targets)[0]


def causal_learn(data: Any) -> Any:
    """`ges` with the BIC of a covariance matrix, the quickest of its Gaussian scores."""
    module = importlib.import_module("causallearn.search.ScoreBased.GES")
    covariance, n = np.cov(data["rows"].T, ddof=0), len(data["rows"])

    def search() -> Any:
        found = module.ges(score_func="local_score_BIC_from_cov", cov=covariance, n=n)
        return found["G"].graph == -1  # [i, j] is the mark of i: -1 a tail, 1 a head

    return search


def xges(data: Any, extended: bool = True) -> Any:
    """`XGES` at BIC's own penalty (alpha 1); its kernels compile before the clock starts."""
    # Without scipy, which it does not declare, the package takes a slower score and only logs it.
    scorer = importlib.import_module("xges.bic_scorer_fast").BICScorerFast
    # For every edge that it tries to do without it copies all rows and all scores it remembers, and
    # changes neither. Without that the graph is the same in a fifth of the time or less.
    scorer.__deepcopy__ = lambda self, _: self
    package = importlib.import_module("xges")

    def search(rows: Any) -> Any:
        model = package.XGES(alpha=1.0)
        model.fit(rows, extended_search=extended, verbose=0)
        return model.get_adjacency_matrix()

    search(np.random.default_rng(0).normal(size=(100, 5)))
    return lambda: search(data["rows"])


def xges_0(data: Any) -> Any:
    """`XGES` without its extended search."""
    return xges(data, extended=False)


def dowhy(data: Any) -> Any:
    """Effect of column pairs[k, 0] on pairs[k, 1] without confounders, as pipelines ask for it."""
    import warnings

    pandas = importlib.import_module("pandas")
    families = importlib.import_module("statsmodels.api").families
    package = importlib.import_module("dowhy")
    warnings.filterwarnings("ignore")
    importlib.import_module("logging").disable(100)

    def effect(code: Any, medication: Any) -> float:
        frame = pandas.DataFrame({"code": code.astype(bool), "medication": medication})
        model = package.CausalModel(
            frame, "code", "medication", graph="digraph {code -> medication;}"
        )
        estimate = model.estimate_effect(
            model.identify_effect(proceed_when_unidentifiable=True),
            method_name="backdoor.generalized_linear_model",
            method_params={"glm_family": families.Binomial()},
        )
        return float(estimate.value)

    rows, pairs = data["rows"], data["pairs"]
    return lambda: np.array([effect(rows[:, i], rows[:, j]) for i, j in pairs])


_RIVALS = {"gies": gies, "causal-learn": causal_learn, "xges": xges, "xges-0": xges_0}


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MB (of 2 ** 20 bytes)."""
    # Not getrusage: its figure begins with that of the process this one was started from.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def versions() -> str:
    """Python and the packages that matter, as installed here."""
    found = [f"Python {sys.version.split()[0]}"]
    for name in _SHOWN:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    """Loads the data, runs the package named, writes its answer, CPU seconds and memory."""
    name, source, target = sys.argv[1:]
    with np.load(source) as stored:
        data = {key: stored[key] for key in stored.files}
    if name != "dowhy":
        data["rows"] = data["rows"].astype(np.float64)
    search = {**_RIVALS, "dowhy": dowhy}[name](data)
    begin = time.process_time()
    answer = np.asarray(search())
    cpu_s = time.process_time() - begin
    np.savez(target, answer=answer, cpu_s=cpu_s, peak_mb=peak_mb(), versions=versions())


if __name__ == "__main__":
    main()
