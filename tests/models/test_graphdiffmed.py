"""GraphDiffMed against its one-visit-at-a-time reference, and what must not change its answer."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml

import models
from cafemed import config, training
from cafemed.batches import ModelInputs, collate
from cafemed.errors import ArtifactError, ConfigError
from cafemed.paths import CONF_DIR
from models.differential import VisitPairs
from models.graphdiffmed import GraphDiffMedOptions
from models.packing import pack

# float32 over some hundred additions of numbers near 1; the logits are of order 1.
TOLERANCE = 1e-5

VARIANTS = {
    "default": {},
    "sex": {"modalities": "G"},
    "sex_and_age": {"modalities": "GY"},
    "laboratory": {"modalities": "L"},
    "everything": {"modalities": "LGY"},
    "laboratory_embeddings": {"modalities": "L", "laboratory_encoding": "embedding"},
    "laboratory_within_visits": {"modalities": "L", "laboratory_scaling": "visit"},
    "two_heads": {"heads": 2},
    "no_graph_bias": {"graph_bias": 0.0},
    "strong_graph_bias": {"graph_bias": 3.0},
    "no_molecules": {"molecules": "none"},
    "three_relation_levels": {"relation_levels": 3},
    "no_virtual_edges": {"virtual_edges": "none"},
    "no_review": {"review": False},
    "review_by_all_effects": {"review_quantiles": "all"},
    "single_state": {"duplicate_state": False},
    "as_published": {"direct": "none"},
    "additive": {"direct": "additive", "direct_start": "even"},
}


NUM_ITEMS = 7


def _with_knowledge(world, zero_share=0.5, seed=3):
    """The world with effects of all classes, of which a share is 0, and all else there may be."""
    rng = np.random.default_rng(seed)
    effects = rng.uniform(-0.4, 1, world.inputs.effects.shape).astype(np.float32)
    effects[rng.random(effects.shape) < zero_share] = 0
    effects[::2] = 0  # codes without any effect, so that some visits have none
    molecules = rng.random((world.inputs.sizes[2], 9)) < 0.15
    molecules[:2] = False  # two medications have no molecule
    molecules[2 + np.arange(9), np.arange(9)] = True  # and every molecule is of one
    inputs = dataclasses.replace(
        world.inputs, effects=effects, molecules=molecules, num_laboratory_items=NUM_ITEMS
    )
    arrays = world.arrays
    # No event, one, several; ids in the padding are valid, values are not numbers.
    number = rng.integers(0, 6, arrays.num_visits).astype(np.int32)
    items = np.stack([rng.permutation(NUM_ITEMS)[:5] for _ in number]).astype(np.int32)
    values = rng.normal(0, 1, items.shape).astype(np.float32)
    values[np.arange(5) >= number[:, None]] = np.nan
    age = rng.normal(0, 1, arrays.num_visits).astype(np.float32)
    age[::4] = np.nan
    sex = (np.arange(arrays.num_patients) % 3).astype(np.int8)
    arrays = dataclasses.replace(
        arrays,
        age=age,
        sex=sex,
        laboratory_items=items,
        laboratory_values=values,
        laboratory_counts=number,
    )
    return dataclasses.replace(world, inputs=inputs, arrays=arrays)


@pytest.fixture(scope="module")
def informed(world):
    return _with_knowledge(world)


def _visits_without_relevance(world):
    """Visits with diagnoses that are relevant to no molecule."""
    relevance = world.inputs.effects.astype(float) @ world.inputs.molecules
    return [
        (p, t)
        for p, visits in enumerate(world.patients)
        for t, visit in enumerate(visits)
        if visit["codes"][0] and not relevance[visit["codes"][0]].any()
    ]


def _expected(reference, model, world, options, patients, weights=None):
    values = dataclasses.asdict(config.from_mapping(GraphDiffMedOptions, options, "model"))
    if weights is None:
        weights = {name: weight.double() for name, weight in model.state_dict().items()}
    inputs = {
        "sizes": world.inputs.sizes,
        "effects": world.inputs.effects.astype(float).tolist(),
        "ddi": world.inputs.ddi.tolist(),
        "molecules": None if world.inputs.molecules is None else world.inputs.molecules.tolist(),
        "num_laboratory_items": world.inputs.num_laboratory_items,
    }
    arrays = world.arrays
    visits_of = [slice(*arrays.patient_offsets[p : p + 2]) for p in range(arrays.num_patients)]
    events = [
        list(zip(items[:number].tolist(), values[:number].tolist(), strict=True))
        for items, values, number in zip(
            arrays.laboratory_items,
            arrays.laboratory_values,
            arrays.laboratory_counts,
            strict=True,
        )
    ]
    return torch.cat(
        [
            reference.patient_logits(
                weights,
                inputs,
                values,
                world.patients[p],
                int(arrays.sex[p]),
                arrays.age[visits_of[p]].tolist(),
                events[visits_of[p]],
            )
            for p in patients
        ]
    )


def _small(options):
    return {"dimension": 16, **options}


@pytest.mark.parametrize("name", VARIANTS)
def test_batched_equals_one_visit_at_a_time(
    name, informed, build_eval, reference_graphdiffmed, logits_of
):
    assert _visits_without_relevance(informed)
    options = _small(VARIANTS[name])
    model = build_eval("graphdiffmed", informed.inputs, options)
    patients = [0, 2, 3, 4]
    expected = _expected(reference_graphdiffmed, model, informed, options, patients)
    got = logits_of(model, informed.arrays, patients).double()
    assert (got - expected).abs().max() < TOLERANCE
    got = logits_of(model.double(), informed.arrays, patients)
    assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "default"])
def test_option_changes_the_answer_or_the_parameters(name, informed, build_eval, logits_of):
    model = build_eval("graphdiffmed", informed.inputs, _small(VARIANTS[name])).double()
    plain = build_eval("graphdiffmed", informed.inputs, _small({})).double()
    shapes = {key: weight.shape for key, weight in plain.state_dict().items()}
    if {key: weight.shape for key, weight in model.state_dict().items()} != shapes:
        return
    model.load_state_dict(plain.state_dict())
    everyone = np.arange(5)
    difference = logits_of(model, informed.arrays, everyone) - logits_of(
        plain, informed.arrays, everyone
    )
    assert difference.abs().max() > 1e-6


def test_equal_at_the_published_dimension_over_lengths_1_to_30(
    make_world, reference_graphdiffmed, logits_of
):
    world = make_world(
        range(1, 31), lambda rng: (rng.integers(1, 4), rng.integers(0, 3), rng.integers(1, 4))
    )
    world = _with_knowledge(world, 0.5)
    options = {"modalities": "LGY"}
    model = models.build("graphdiffmed", world.inputs, options, seed=3).eval()
    together = logits_of(model, world.arrays, np.arange(30))
    patients = [0, 1, 6, 13]
    expected = _expected(reference_graphdiffmed, model, world, options, patients)
    rows = np.concatenate([np.arange(*world.arrays.patient_offsets[p : p + 2]) for p in patients])
    assert (together[rows].double() - expected).abs().max() < TOLERANCE
    # The other lengths by themselves, which the reference is slow for.
    for patient in range(30):
        own = logits_of(model, world.arrays, [patient])
        first, end = world.arrays.patient_offsets[patient : patient + 2]
        assert (own - together[first:end]).abs().max() < TOLERANCE


def test_equal_for_one_visit_beside_twenty_nine(
    make_world, build_eval, reference_graphdiffmed, logits_of
):
    world = make_world(
        [1, 29], lambda rng: (rng.integers(1, 3), rng.integers(0, 2), rng.integers(0, 3))
    )
    world = _with_knowledge(world)
    options = {"dimension": 4, "heads": 2, "molecules": "none", "modalities": "G"}
    model = build_eval("graphdiffmed", world.inputs, options)
    expected = _expected(reference_graphdiffmed, model, world, options, [0, 1])
    got = logits_of(model, world.arrays, [0, 1]).double()
    assert (got - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "counts",
    [(1, 0, 1), (1, 1, 1), (6, 0, 3), (1, 0, 9), (0, 0, 4), (0, 0, 0), (0, 5, 1), (4, 2, 0)],
)
@pytest.mark.parametrize("zero_share", [0.0, 1.0])
def test_equal_for_visits_with_few_or_no_codes(
    counts, zero_share, make_world, build_eval, reference_graphdiffmed, logits_of
):
    world = _with_knowledge(make_world([1, 3], lambda _: counts), zero_share)
    options = _small({"modalities": "LGY"})
    model = build_eval("graphdiffmed", world.inputs, options)
    expected = _expected(reference_graphdiffmed, model, world, options, [0, 1])
    got = logits_of(model, world.arrays, [0, 1]).double()
    assert (got - expected).abs().max() < TOLERANCE


def test_permuting_patients_changes_nothing(informed, build_eval, logits_of):
    model = build_eval("graphdiffmed", informed.inputs, _small({"modalities": "LGY"}))
    alone = {p: logits_of(model, informed.arrays, [p]) for p in range(5)}
    for order in ([0, 1, 2, 3, 4], [4, 1, 0, 3, 2], [1, 0]):
        expected = torch.cat([alone[p] for p in order])
        got = logits_of(model, informed.arrays, order)
        assert (got - expected).abs().max() < TOLERANCE


def test_bits_do_not_depend_on_the_others_in_a_batch_of_the_same_shape(make_world):
    # Serving keeps the numbers of visits and codes of a batch fixed, but not how many of the codes
    # are diagnoses or are relevant to a molecule.
    splits = [(8, 2, 2), (2, 8, 2), (2, 2, 8), (12, 0, 0), (4, 4, 4)]
    first_splits = [(8, 2, 0), (2, 8, 0), (10, 0, 0), (5, 5, 0)]
    turn = iter(range(10**6))

    def counts(rng):
        number = next(turn)
        return first_splits[number % 4] if number % 3 == 0 else splits[rng.integers(0, 5)]

    world = _with_knowledge(make_world([3] * 40, counts))
    model = models.build("graphdiffmed", world.inputs, {"modalities": "LGY"}, seed=1).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        seen = []
        for place in (0, 3, 7):
            company = rng.permutation(np.arange(1, 40))[:7]
            batch = collate(world.arrays, np.insert(company, place, 0))
            assert int(batch.counts.sum()) == 8 * 34
            seen.append(model(batch)[place])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_padding_content_changes_nothing(informed, build_eval):
    model = build_eval("graphdiffmed", informed.inputs, _small({"modalities": "LGY"}))
    batch = collate(informed.arrays, np.arange(5))
    padding = torch.arange(batch.codes.shape[2]) >= batch.counts[:, :, None]
    generator = torch.Generator().manual_seed(0)
    random_ids = torch.stack(
        [
            torch.randint(n, batch.codes[:, 0].shape, generator=generator)
            for n in informed.inputs.sizes
        ],
        1,
    )
    random_classes = torch.randint(4, batch.classes.shape, generator=generator)
    unmeasured = torch.arange(5) >= batch.laboratory_counts[:, None]
    assert torch.isnan(batch.laboratory_values[unmeasured]).all()
    random_items = torch.randint(NUM_ITEMS, batch.laboratory_items.shape, generator=generator)
    other = dataclasses.replace(
        batch,
        codes=torch.where(padding, random_ids, batch.codes),
        classes=torch.where(padding, random_classes, batch.classes),
        laboratory_items=torch.where(unmeasured, random_items, batch.laboratory_items),
        laboratory_values=torch.where(unmeasured, 3.0, batch.laboratory_values),
    )
    assert not torch.equal(other.codes, batch.codes)
    assert not torch.equal(other.laboratory_items, batch.laboratory_items)
    with torch.no_grad():
        assert torch.equal(model(other), model(batch))
    model.train()
    gradients = []
    for given in (batch, other):
        model.zero_grad()
        torch.manual_seed(0)
        batch.flatten(model(given)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.isfinite(gradient).all() for gradient in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_order_of_codes_does_not_matter(informed, build_eval, logits_of):
    # Unlike in CafeMed: codes enter as sums and sets.
    model = build_eval("graphdiffmed", informed.inputs, _small({}))
    arrays = informed.arrays
    codes, classes = arrays.codes.copy(), arrays.classes.copy()
    for v, k in np.ndindex(arrays.counts.shape):
        n = arrays.counts[v, k]
        codes[v, k, :n], classes[v, k, :n] = codes[v, k, :n][::-1], classes[v, k, :n][::-1]
    turned = dataclasses.replace(arrays, codes=codes, classes=classes)
    difference = logits_of(model, turned, [1, 3]) - logits_of(model, arrays, [1, 3])
    assert difference.abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("modalities", "sex_enters", "age_enters"),
    [("none", False, False), ("G", True, False), ("GY", True, True)],
)
def test_sex_and_age_enter_as_asked(modalities, sex_enters, age_enters, informed, build_eval):
    model = build_eval("graphdiffmed", informed.inputs, _small({"modalities": modalities}))
    batch = collate(informed.arrays, np.arange(5))
    with torch.no_grad():
        plain = model(batch)
        other_sex = model(dataclasses.replace(batch, sex=(batch.sex + 1) % 3))
        other_age = model(dataclasses.replace(batch, age=batch.age + 1))
    assert torch.equal(plain, other_sex) is not sex_enters
    assert torch.equal(plain, other_age) is not age_enters


def test_unknown_age_counts_as_the_mean_and_unknown_sex_starts_at_zero(informed):
    model = models.build("graphdiffmed", informed.inputs, _small({"modalities": "GY"})).eval()
    batch = collate(informed.arrays, np.arange(5))
    assert torch.isnan(batch.age).any()
    mean = dataclasses.replace(batch, age=torch.nan_to_num(batch.age, nan=0.0))
    with torch.no_grad():
        assert torch.equal(model(batch), model(mean))
    assert torch.isfinite(model(batch)).all()
    assert not model.demographics.sex[0].any()
    assert model.demographics.sex[1:].all()


def test_only_the_age_at_the_visit_itself_enters(informed, build_eval, logits_of):
    # As published; the age at a visit before is not looked at.
    model = build_eval("graphdiffmed", informed.inputs, _small({"modalities": "GY"}))
    age = np.nan_to_num(informed.arrays.age)
    first, end = informed.arrays.patient_offsets[3:5]
    changed = age.copy()
    changed[first] += 1
    before = logits_of(model, dataclasses.replace(informed.arrays, age=age), [3])
    after = logits_of(model, dataclasses.replace(informed.arrays, age=changed), [3])
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])
    assert end - first == 5


def test_logits_of_a_visit_do_not_depend_on_later_visits(informed, build_eval, logits_of):
    model = build_eval("graphdiffmed", informed.inputs, _small({}))
    before = logits_of(model, informed.arrays, [3])
    codes = informed.arrays.codes.copy()
    last = informed.arrays.patient_offsets[4] - 1
    codes[last] = (codes[last] + 1) % np.array(informed.inputs.sizes)[:, None]
    after = logits_of(model, dataclasses.replace(informed.arrays, codes=codes), [3])
    assert (before[:-1] - after[:-1]).abs().max() < TOLERANCE
    assert (before[-1] - after[-1]).abs().max() > 1e-3


def test_interactions_with_earlier_medications_draw_attention(informed, build_eval, logits_of):
    # Only where a visit and one before it both have previous medications, i.e. from the third on.
    options = _small({"graph_bias": 20.0, "direct": "none"})
    with_pairs = build_eval("graphdiffmed", informed.inputs, options)
    none = dataclasses.replace(informed.inputs, ddi=np.zeros_like(informed.inputs.ddi))
    without = build_eval("graphdiffmed", none, options)
    got = logits_of(with_pairs, informed.arrays, [3])
    plain = logits_of(without, informed.arrays, [3])
    assert (got[:2] - plain[:2]).abs().max() < TOLERANCE
    assert (got[2:] - plain[2:]).abs().max() > 1e-3


def test_interaction_rates_are_those_of_the_pairs_of_sets(informed):
    model = models.build("graphdiffmed", informed.inputs, _small({})).double()
    batch = collate(informed.arrays, np.array([1, 3]))
    packing = pack(batch, informed.inputs.sizes, first_visit_slot=False)
    pairs = VisitPairs.of(batch)
    rates = model.interaction_rates(pairs, packing)
    visits = [v["codes"][2] for p in (1, 3) for v in informed.patients[p]]
    place = [(p, t) for p in (1, 3) for t in range(len(informed.patients[p]))]
    expected = [(a, b) for a in range(34) for b in range(a) if place[a][0] == place[b][0]]
    assert list(zip(pairs.later.tolist(), pairs.earlier.tolist(), strict=True)) == expected
    for rate, (later, earlier) in zip(rates, expected, strict=True):
        found = informed.inputs.ddi[np.ix_(visits[later], visits[earlier])]
        assert float(rate) == pytest.approx(found.mean() if found.size else 0.0, abs=1e-12)
    assert (rates > 0).any()


def test_logits_have_the_shape_and_type_that_the_contract_states(informed):
    model = models.build("graphdiffmed", informed.inputs)
    logits = model(collate(informed.arrays, np.array([2, 1])))
    assert logits.shape == (2, 29, 11)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert (logits[0, 2:] == 0).all()


def test_batch_of_other_vocabularies_is_refused(informed):
    model = models.build("graphdiffmed", informed.inputs)
    batch = collate(dataclasses.replace(informed.arrays, sizes=(24, 16, 11)), np.array([0]))
    with pytest.raises(ArtifactError, match=r"built for .*\(23, 17, 11\).* have \(24, 16, 11\)"):
        model(batch)


def test_molecules_asked_for_and_not_there_are_refused(world):
    with pytest.raises(ConfigError) as caught:
        models.build("graphdiffmed", world.inputs, {"molecules": "always"})
    assert str(caught.value).startswith("model.molecules: expected a cohort with molecules")
    assert "\n" not in str(caught.value)
    assert models.build("graphdiffmed", world.inputs, {"molecules": "auto"}).molecules is None


@pytest.mark.parametrize("modalities", ["L", "LGY"])
def test_laboratory_items_asked_for_and_not_there_are_refused(modalities, world):
    with pytest.raises(ConfigError) as caught:
        models.build("graphdiffmed", world.inputs, {"modalities": modalities})
    expected = f"model.modalities: expected a cohort with laboratory items for {modalities}, "
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_ratio": 4}, "model.reduction_ratio: unknown key; known keys: dimension"),
        ({"heads": 6}, "model: heads: expected a divisor of dimension = 64, got 6"),
        ({"relation_levels": 1}, "model.relation_levels: expected a value in [2, 100], got 1"),
        ({"modalities": "Y"}, "model.modalities: expected one of 'none', 'G', 'GY'"),
        ({"graph_bias": -1}, "model.graph_bias: expected a value in [0, inf], got -1"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message, world):
    with pytest.raises(ConfigError) as caught:
        models.build("graphdiffmed", world.inputs, options)
    assert str(caught.value).startswith(message)


def test_same_seed_gives_the_same_weights_to_the_bit(informed):
    options = {"modalities": "GY"}
    a = models.build("graphdiffmed", informed.inputs, options, seed=5).state_dict()
    torch.manual_seed(99)
    b = models.build("graphdiffmed", informed.inputs, options, seed=5).state_dict()
    c = models.build("graphdiffmed", informed.inputs, options, seed=6).state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embedding"], c["embedding"])
    # What follows from the inputs is not saved with the weights.
    model = models.build("graphdiffmed", informed.inputs, options)
    assert set(a) == {name for name, _ in model.named_parameters()}


def test_training_is_the_same_to_the_bit_for_a_seed(informed):
    def train():
        torch.manual_seed(3)
        model = models.build("graphdiffmed", informed.inputs, _small({"modalities": "GY"})).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(3):
            batch = collate(informed.arrays, np.arange(5))
            optimizer.zero_grad()
            batch.flatten(model(batch)).pow(2).mean().backward()
            optimizer.step()
        return model.state_dict()

    one, other = train(), train()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_weights_start_as_stated(informed):
    weights = models.build("graphdiffmed", informed.inputs, {"modalities": "GY"}).state_dict()
    for name in ("embedding", "molecules.embedding", "demographics.age.weight"):
        assert 0.09 < weights[name].abs().max() <= 0.1
    assert torch.equal(weights["class_mask.mask"], torch.ones(3, 4, 64))
    assert weights["review.lowering"] == weights["review.raising"] == torch.tensor(0.01)
    assert weights["inter.query.weight"].shape == (128, 64)
    assert weights["inter.gate.weight"].shape == (8, 64)
    assert weights["head.weight"].shape == (11, 10 * 64)


def test_parameters_at_mimic3_sizes():
    sizes = (1958, 1430, 131)
    effects = np.zeros((sizes[0] + sizes[1], sizes[2]), np.float32)
    ddi = np.zeros((sizes[2], sizes[2]), np.bool_)
    molecules = np.ones((sizes[2], 284), np.bool_)
    attention = 64 * 64 + 64
    intra, inter = 2 * attention + 8 * 65, 2 * 64 * 65 + 3 * attention + 8 * 65
    base = sum(sizes) * 64 + 3 * 4 * 64 + 3 * 2 * (192 * 64 + 192) + intra + inter + 2
    inputs = ModelInputs(sizes, effects, ddi)
    model = models.build("graphdiffmed", inputs, {"direct": "none"})
    number = sum(p.numel() for p in model.parameters())
    assert number == base + (8 * 64 + 1) * 131 == 398_229
    molecular = 284 * 64 + 4 * (7 * 64 * 64 + 64) + 2 * (64 * 64 + 64)
    inputs = dataclasses.replace(inputs, molecules=molecules)
    model = models.build("graphdiffmed", inputs, {"modalities": "GY", "direct": "none"})
    number = sum(p.numel() for p in model.parameters())
    assert number == base + molecular + 3 * 64 + 2 * 64 + (10 * 64 + 1) * 131


@pytest.fixture(scope="module")
def crowded(make_world):
    """Enough visits that every code and relation has an edge, and visits without any."""
    return _with_knowledge(make_world([1, 29, 2, 5, 3, 20, 20, 20]), 0.3)


def _gradients(build_eval, world, options):
    """Gradients of a loss in double precision, where what does not learn is clearly apart."""
    torch.manual_seed(0)
    model = build_eval("graphdiffmed", world.inputs, _small({"dropout": 0.2, **options}))
    model.double().train()
    batch = collate(world.arrays, np.arange(world.arrays.num_patients))
    logits, targets = batch.flatten(model(batch)), batch.targets.double()
    torch.nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_all_but_what_is_named(name, crowded, build_eval):
    """By design these do not learn; the rest does.

    - The embeddings of medications whose molecules stand for them.
    - The key's bias between visits: it moves all scores of a query alike, and a softmax does not
      see that.
    - The virtual relation without virtual edges.
    (Queries and keys within a visit and the weights of a medication's molecules, which could not
    learn either, do not exist: the reference draws them at random and its answer is the same.)
    """
    options = VARIANTS[name]
    gradients = _gradients(build_eval, crowded, options)
    for parameter, gradient in gradients.items():
        assert gradient is not None, parameter
        if parameter == "inter.key.bias":
            assert gradient.abs().max() < 1e-15
        else:
            assert gradient.abs().max() > 1e-9, parameter
    by_row = gradients["embedding"].abs().sum(1)
    assert (by_row[:40] > 0).all()  # 100 visits hold every code
    used = ~crowded.inputs.molecules.any(1) | (options.get("molecules") == "none")
    assert ((by_row[40:] > 0).numpy() == used).all()
    assert (gradients["class_mask.mask"].abs().sum(2) > 0).all()
    if options.get("molecules") == "none":
        return
    assert (gradients["molecules.embedding"].abs().sum(1) > 0).all()
    for layer in ("first", "second"):
        for kind in ("diagnosis", "procedure"):
            reached = gradients[f"molecules.{layer}.{kind}.weight"].abs().amax((1, 2)) > 1e-12
            assert reached[0] == (options.get("virtual_edges") != "none")
            assert reached[1:].all()


@pytest.mark.parametrize(
    "options",
    [
        {"modalities": "LGY", "laboratory_scaling": "visit"},
        {"molecules": "none", "modalities": "L", "laboratory_encoding": "embedding"},
    ],
)
def test_gradients_are_those_of_the_reference(
    options, informed, build_eval, reference_graphdiffmed
):
    options = _small({"dropout": 0.0, "attention_dropout": 0.0, **options})
    model = build_eval("graphdiffmed", informed.inputs, options).double().train()
    batch = collate(informed.arrays, np.array([0, 2, 3, 4]))
    weight = torch.linspace(-1, 1, 11, dtype=torch.float64)
    (batch.flatten(model(batch)) * weight).sum().backward()
    leaves = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    expected = _expected(
        reference_graphdiffmed, model, informed, options, [0, 2, 3, 4], weights=leaves
    )
    (expected * weight).sum().backward()
    for name, parameter in model.named_parameters():
        scale = leaves[name].grad.abs().max().clamp(min=1)
        assert (parameter.grad - leaves[name].grad).abs().max() < 1e-11 * scale, name


def test_dropout_is_drawn_for_embeddings_demographics_and_contexts(informed):
    model = models.build("graphdiffmed", informed.inputs, _small({"modalities": "GY"})).train()
    seen = []
    for module in (model.dropout, model.intra.dropout, model.inter.dropout):
        module.register_forward_hook(lambda m, _, out: seen.append((m, out)))
    torch.manual_seed(0)
    model(collate(informed.arrays, np.arange(5)))
    rates = {}
    for module, out in seen:
        rates.setdefault(id(module), []).append(float((out == 0).float().mean()))
    embedded, sex, age = rates[id(model.dropout)]
    assert abs(embedded - 0.7) < 0.02
    assert abs(age - 0.7) < 0.1
    assert sex > 0.7  # the row of unknown sex is still 0
    for module in (model.intra, model.inter):
        [rate] = rates[id(module.dropout)]
        assert 0.25 < rate < 0.45  # contexts of visits without codes or without earlier ones are 0


def test_evaluation_draws_no_dropout(informed, logits_of):
    model = models.build("graphdiffmed", informed.inputs, _small({"modalities": "GY"})).eval()
    first = logits_of(model, informed.arrays, [0, 3])
    assert torch.equal(first, logits_of(model, informed.arrays, [0, 3]))


def test_the_configuration_file_spells_out_the_defaults():
    written = yaml.safe_load((CONF_DIR / "model" / "graphdiffmed.yaml").read_text())
    assert written.pop("name") == "graphdiffmed"
    assert written == dataclasses.asdict(GraphDiffMedOptions())


def test_learns_more_than_which_medications_are_frequent(make_world):
    # A medication is given if one of its two diagnoses is there or, seldom, by chance.
    world = make_world(
        [3] * 160, lambda rng: (rng.integers(2, 6), rng.integers(0, 3), rng.integers(1, 5))
    )
    arrays, rng = world.arrays, np.random.default_rng(1)
    wanted = rng.random(arrays.targets.shape) < 0.05
    for v in range(arrays.num_visits):
        wanted[v, [c // 2 for c in arrays.codes[v, 0, : arrays.counts[v, 0]] if c < 22]] = True
    arrays = dataclasses.replace(arrays, targets=wanted)
    inputs = dataclasses.replace(world.inputs, ddi=np.zeros_like(world.inputs.ddi))
    found = training.fit(
        models.build,
        "graphdiffmed",
        _small({"dropout": 0.2, "direct": "none"}),
        inputs,
        arrays,
        np.arange(120),
        np.arange(120, 160),
        training.FitConfig(epochs=25, batch_size=16, learning_rate=0.01),
    )
    losses = [report.losses["loss"] for report in found.history]
    assert losses[-1] < 0.6 * losses[0]
    frequent = np.argsort(-arrays.targets[:360].mean(0))
    best = max(
        _jaccard(arrays.targets[360:], np.isin(np.arange(11), frequent[:n])) for n in range(1, 12)
    )
    assert best < 0.45
    assert found.metrics.jaccard > best + 0.2


def _jaccard(targets, predicted):
    return float(((targets & predicted).sum(1) / (targets | predicted).sum(1)).mean())
