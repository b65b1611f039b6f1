"""The process in which cdt and R run: `python -m causal.cdt_process FOLDER` (see `cdt_engine`).

Reads FOLDER/input.npz, writes FOLDER/answer.npy: the graph of a table, or the distance of two
graphs, by what the input holds.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def main(folder: Path) -> None:
    """Answers with the adjacency, int8 (p, p), or with the distance's bounds, float64 (2,)."""
    warnings.simplefilter("ignore")  # cdt warns on import that there is no GPU
    with np.load(folder / "input.npz", allow_pickle=False) as given:
        content = dict(given)
    answer = gies(**content) if "table" in content else distance(**content)
    np.save(folder / "answer.npy", answer)


def distance(target: NDArray[np.int8], predicted: NDArray[np.int8]) -> NDArray[np.float64]:
    """Runs cdt's SID_CPDAG: smallest and largest distance."""
    from cdt.metrics import SID_CPDAG
    from cdt.utils.R import RPackages

    RPackages.SID = True  # as below
    return np.array([float(bound) for bound in SID_CPDAG(target, predicted)])


def gies(table: NDArray[np.float64], gaps: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Runs cdt's GIES on a table."""
    import networkx as nx
    import pandas as pd
    from cdt.causality.graph import GIES
    from cdt.utils.R import RPackages

    # Looking for pcalg would start R a second time; the script itself fails if it is missing.
    RPackages.pcalg = True
    names = [f"c{j:06d}" for j in range(table.shape[1])]
    frame = pd.DataFrame(table, columns=names)
    skeleton = None
    if gaps.any():
        skeleton = nx.from_numpy_array(~gaps & ~np.eye(len(gaps), dtype=np.bool_))
        skeleton = nx.relabel_nodes(skeleton, dict(enumerate(names)))
    found = GIES(verbose=False).predict(frame, skeleton)
    adjacency: NDArray[np.int8] = np.asarray(nx.to_numpy_array(found, nodelist=names) != 0, np.int8)
    return adjacency


if __name__ == "__main__":
    main(Path(sys.argv[1]))
