"""The process in which cdt and R run: `python -m causal.cdt_process FOLDER` (see `cdt_engine`).

Reads FOLDER/input.npz, writes FOLDER/answer.npy.
"""

import sys
import warnings
from pathlib import Path

import numpy as np


def main(folder: Path) -> None:
    """Runs cdt's GIES on the table and writes the adjacency, int8 (p, p)."""
    with np.load(folder / "input.npz", allow_pickle=False) as given:
        table, gaps = given["table"], given["gaps"]
    warnings.simplefilter("ignore")  # cdt warns on import that there is no GPU
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
    adjacency = nx.to_numpy_array(found, nodelist=names) != 0
    np.save(folder / "answer.npy", adjacency.astype(np.int8))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
