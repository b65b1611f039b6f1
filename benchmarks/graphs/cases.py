"""What benchmarks/discovery.py measures: data sets, scores, searches and other packages."""

from typing import Any, NamedTuple

Options = tuple[tuple[str, Any], ...]
SEARCHES = ("fast", "textbook", "best")


class Case(NamedTuple):
    """One data set and one way to search it: a search of the engine, or another package."""

    kind: str
    columns: int
    score: str
    search: str
    options: Options = ()

    @property
    def data(self) -> str:
        """The data set and the score: cases with the same one can be compared."""
        extra = "".join(f" {key}={value}" for key, value in self.options)
        return f"{self.kind} p={self.columns} {self.score}{extra}"

    @property
    def name(self) -> str:
        """As in the table and the JSON rows."""
        return f"{self.data} {self.search}"


#: Scores for rare codes, compared on binary data; the last of each name with --quick.
STRICT: tuple[tuple[str, Options], ...] = (
    ("gaussian_bic", (("penalty", 3),)),
    ("gaussian_bic", (("penalty", 5), ("min_support", 5))),
    ("extended_bic", (("gamma", 1), ("min_support", 5))),
    ("extended_bic", (("gamma", 2), ("min_support", 5))),
    ("discrete_bic", (("min_support", 5),)),
    ("discrete_bic", (("penalty", 2), ("min_support", 5))),
    ("bdeu", (("gamma", 0), ("min_support", 5))),
    ("bdeu", (("gamma", 1), ("min_support", 5))),
    ("bdeu", (("gamma", 1), ("min_support", 3))),
)


def cases(quick: bool) -> list[Case]:
    """What is measured, cases of one data set beside each other."""
    found = _quick() if quick else _full()
    return sorted(dict.fromkeys(found), key=lambda case: (case.kind, case.columns))


def _full() -> list[Case]:
    sizes = {"gauss": (50, 100, 200, 500), "binary": (50, 100, 200, 500), "int": (50, 200, 500)}
    plain = [case for kind in sizes for p in sizes[kind] for case in _searches(kind, p)]
    large = [Case("gauss", p, "gaussian_bic", "fast") for p in (1958, 3519)]
    strict = [
        Case("binary", p, score, "fast", options)
        for p in (200, 500, 1958, 3519)
        for score, options in STRICT
    ]
    thorough = [
        case
        for p in (500, 1958)
        for score, options in dict(STRICT).items()
        if score != "gaussian_bic"
        for case in _searches("binary", p, score, options)
    ]
    alone = [
        Case("independent", 500, score, "fast", options)
        for score, options in (("gaussian_bic", ()), *STRICT)
    ]
    sizes = {
        "xges-0": (50, 200, 500),
        "xges": (50, 100, 200),
        "causal-learn": (20, 50, 100),
        "gies": (20, 50),
    }
    others = [
        Case(kind, p, "gaussian_bic", name)
        for kind in ("gauss", "binary")
        for name in sizes
        for p in sizes[name]
    ]
    # With 500 binary columns xges would need most of an hour.
    others.append(Case("gauss", 500, "gaussian_bic", "xges"))
    smallest = [case for kind in ("gauss", "binary") for case in _searches(kind, 20)]
    return plain + large + strict + thorough + alone + others + smallest + _own_means((20, 50))


def _quick() -> list[Case]:
    last = dict(STRICT).items()
    packages = ("gies", "causal-learn", "xges")
    return [
        *(case for kind in ("gauss", "binary", "int") for case in _searches(kind, 200)),
        *(Case("binary", 200, score, "fast", options) for score, options in last),
        Case("independent", 200, "gaussian_bic", "fast"),
        Case("independent", 200, STRICT[-1][0], "fast", STRICT[-1][1]),
        *(Case("gauss", 20, "gaussian_bic", name) for name in ("best", *packages)),
        *_own_means((20,))[1:],
    ]


def _searches(kind: str, p: int, score: str = "gaussian_bic", options: Options = ()) -> list[Case]:
    return [Case(kind, p, score, search, options) for search in SEARCHES]


def _own_means(sizes: tuple[int, ...]) -> list[Case]:
    """Interventional cases with the intercepts of the gies package, so that scores are equal."""
    options: Options = (("intercept", "per_environment"),)
    return [
        Case("int", p, "gaussian_bic", search, options)
        for p in sizes
        for search in ("textbook", "best", "gies")
    ]
