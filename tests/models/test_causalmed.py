"""CausalMed against its one-visit-at-a-time reference, and what must not change its answer."""

import dataclasses

import numpy as np
import pytest
import torch
import yaml

import models
from cafemed import config, training
from cafemed.batches import ModelInputs, collate
from cafemed.errors import ArtifactError, ConfigError
from cafemed.evaluation import predict
from cafemed.paths import CONF_DIR
from models.causalmed import CausalMedOptions

# float32 over some hundred additions of numbers near 1; the logits are of order 1.
TOLERANCE = 1e-5

VARIANTS = {
    "default": {},
    "two_levels": {"effect_levels": 2},
    "many_levels": {"effect_levels": 20},
    "absolute": {"effect_sign": "absolute"},
    "virtual_from_first": {"virtual_edges": "first"},
    "no_virtual_later": {"virtual_edges": "none"},
    "no_first_visit_slot": {"first_visit_slot": False},
    "no_slot_no_virtual": {"first_visit_slot": False, "virtual_edges": "none"},
    "single_state": {"duplicate_state": False},
}


def _with_effects(world, zero_share, seed=3):
    """The world with effects in (-1, 1), all classes among them, of which a share is 0."""
    rng = np.random.default_rng(seed)
    effects = rng.uniform(-0.4, 1, world.inputs.effects.shape).astype(np.float32)
    effects[rng.random(effects.shape) < zero_share] = 0
    return dataclasses.replace(world, inputs=dataclasses.replace(world.inputs, effects=effects))


@pytest.fixture(scope="module")
def related(world):
    """The world whose effects are mostly 0, so that some later visits have none at all."""
    return _with_effects(world, 0.9)


def _visits_without_effects(world):
    """Later visits with medications and diagnoses whose effects are all 0."""
    return [
        (p, t)
        for p, visits in enumerate(world.patients)
        for t, visit in enumerate(visits)
        if t > 0 and not world.inputs.effects[np.ix_(visit["codes"][0], visit["codes"][2])].any()
    ]


def _expected(reference, model, world, options, patients):
    values = dataclasses.asdict(config.from_mapping(CausalMedOptions, options, "model"))
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    effects = torch.from_numpy(world.inputs.effects).double()
    return torch.cat(
        [
            reference.patient_logits(
                weights, effects, world.inputs.sizes, values, world.patients[p]
            )
            for p in patients
        ]
    )


def _small(options):
    return {"dimension": 16, **options}


@pytest.mark.parametrize("name", VARIANTS)
def test_batched_equals_one_visit_at_a_time(
    name, related, build_eval, reference_causalmed, logits_of
):
    assert _visits_without_effects(related)
    options = _small(VARIANTS[name])
    model = build_eval("causalmed", related.inputs, options)
    patients = [0, 1, 2, 3, 4] if name == "default" else [0, 2, 3, 4]
    expected = _expected(reference_causalmed, model, related, options, patients)
    got = logits_of(model, related.arrays, patients).double()
    assert (got - expected).abs().max() < TOLERANCE
    got = logits_of(model.double(), related.arrays, patients)
    assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "default"])
def test_option_changes_the_answer_or_the_parameters(name, related, build_eval, logits_of):
    model = build_eval("causalmed", related.inputs, _small(VARIANTS[name])).double()
    plain = build_eval("causalmed", related.inputs, _small({})).double()
    shapes = {key: weight.shape for key, weight in plain.state_dict().items()}
    if {key: weight.shape for key, weight in model.state_dict().items()} != shapes:
        return
    model.load_state_dict(plain.state_dict())
    everyone = np.arange(5)
    difference = logits_of(model, related.arrays, everyone) - logits_of(
        plain, related.arrays, everyone
    )
    assert difference.abs().max() > 1e-6


def test_equal_at_the_published_dimension_over_lengths_1_to_30(
    make_world, reference_causalmed, logits_of
):
    world = make_world(
        range(1, 31), lambda rng: (rng.integers(1, 4), rng.integers(0, 3), rng.integers(1, 4))
    )
    world = _with_effects(world, 0.5)
    model = models.build("causalmed", world.inputs, seed=3).eval()
    together = logits_of(model, world.arrays, np.arange(30))
    patients = [0, 1, 6, 13, 22, 29]
    expected = _expected(reference_causalmed, model, world, {}, patients)
    rows = np.concatenate([np.arange(*world.arrays.patient_offsets[p : p + 2]) for p in patients])
    assert (together[rows].double() - expected).abs().max() < TOLERANCE
    # The other lengths by themselves, which the reference is slow for.
    for patient in range(30):
        own = logits_of(model, world.arrays, [patient])
        first, end = world.arrays.patient_offsets[patient : patient + 2]
        assert (own - together[first:end]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "counts",
    [(1, 0, 1), (1, 1, 1), (6, 0, 3), (1, 0, 9), (0, 0, 4), (0, 0, 0), (0, 5, 1), (4, 2, 0)],
)
@pytest.mark.parametrize("zero_share", [0.0, 1.0])
def test_equal_for_visits_with_few_or_no_codes(
    counts, zero_share, make_world, build_eval, reference_causalmed, logits_of
):
    world = _with_effects(make_world([1, 3], lambda _: counts), zero_share)
    options = _small({})
    model = build_eval("causalmed", world.inputs, options)
    expected = _expected(reference_causalmed, model, world, options, [0, 1])
    got = logits_of(model, world.arrays, [0, 1]).double()
    assert (got - expected).abs().max() < TOLERANCE


def test_effects_are_sorted_into_classes_as_stated(make_world):
    world = make_world([1])
    effects = np.zeros_like(world.inputs.effects)
    # Bounds belong to the class below them, as effects are stored (float32).
    effects[0, :9] = [0.1, 0.2, 0.21, 0.4, 0.41, 0.6, 0.8, 0.81, 1.0]
    effects[23, :2] = [-0.9, 0.5]  # the first procedure
    inputs = dataclasses.replace(world.inputs, effects=effects)
    table = models.build("causalmed", inputs).heterogeneous.relations.table
    assert table[0].tolist() == [-1, -1, 1, 1, 2, 2, 3, 4, 4, -2, -2]
    assert table[23, :3].tolist() == [-1, 8, -2]
    table = models.build(
        "causalmed", inputs, {"effect_sign": "absolute"}
    ).heterogeneous.relations.table
    assert table[23, :3].tolist() == [10, 8, -2]


def test_later_visit_without_effects_reaches_its_own_codes_only(make_world, build_eval, logits_of):
    # The published list of virtual edges runs into the nodes after it when a visit has several
    # medications; here what one patient's visit holds must not reach another's.
    world = _with_effects(make_world([3, 3, 3], lambda _: (2, 2, 5)), 1.0)
    model = build_eval("causalmed", world.inputs, _small({}))
    alone = torch.cat([logits_of(model, world.arrays, [p]) for p in range(3)])
    assert (logits_of(model, world.arrays, [0, 1, 2]) - alone).abs().max() < TOLERANCE


def test_permuting_patients_changes_nothing(related, build_eval, logits_of):
    model = build_eval("causalmed", related.inputs, _small({}))
    alone = {p: logits_of(model, related.arrays, [p]) for p in range(5)}
    for order in ([0, 1, 2, 3, 4], [4, 1, 0, 3, 2], [1, 0]):
        expected = torch.cat([alone[p] for p in order])
        got = logits_of(model, related.arrays, order)
        assert (got - expected).abs().max() < TOLERANCE


def test_padding_content_changes_nothing(related, build_eval):
    model = build_eval("causalmed", related.inputs, _small({}))
    batch = collate(related.arrays, np.arange(5))
    padding = torch.arange(batch.codes.shape[2]) >= batch.counts[:, :, None]
    generator = torch.Generator().manual_seed(0)
    random_ids = torch.stack(
        [
            torch.randint(n, batch.codes[:, 0].shape, generator=generator)
            for n in related.inputs.sizes
        ],
        1,
    )
    random_classes = torch.randint(4, batch.classes.shape, generator=generator)
    other = dataclasses.replace(
        batch,
        codes=torch.where(padding, random_ids, batch.codes),
        classes=torch.where(padding, random_classes, batch.classes),
    )
    assert not torch.equal(other.codes, batch.codes)
    with torch.no_grad():
        assert torch.equal(model(other), model(batch))


def test_order_of_codes_does_not_matter(related, build_eval, logits_of):
    # Unlike in CafeMed: its branches are sums over codes.
    model = build_eval("causalmed", related.inputs, _small({}))
    arrays = related.arrays
    codes, classes = arrays.codes.copy(), arrays.classes.copy()
    for v, k in np.ndindex(arrays.counts.shape):
        n = arrays.counts[v, k]
        codes[v, k, :n], classes[v, k, :n] = codes[v, k, :n][::-1], classes[v, k, :n][::-1]
    turned = dataclasses.replace(arrays, codes=codes, classes=classes)
    difference = logits_of(model, turned, [1, 3]) - logits_of(model, arrays, [1, 3])
    assert difference.abs().max() < TOLERANCE


def test_sex_and_age_do_not_enter(related, build_eval):
    model = build_eval("causalmed", related.inputs, _small({}))
    batch = collate(related.arrays, np.arange(5))
    other = dataclasses.replace(batch, sex=batch.sex + 1, age=torch.full_like(batch.age, 50.0))
    with torch.no_grad():
        assert torch.equal(model(other), model(batch))


def test_logits_of_a_visit_do_not_depend_on_later_visits(related, build_eval, logits_of):
    model = build_eval("causalmed", related.inputs, _small({}))
    before = logits_of(model, related.arrays, [3])
    codes = related.arrays.codes.copy()
    last = related.arrays.patient_offsets[4] - 1
    codes[last] = (codes[last] + 1) % np.array(related.inputs.sizes)[:, None]
    after = logits_of(model, dataclasses.replace(related.arrays, codes=codes), [3])
    assert (before[:-1] - after[:-1]).abs().max() < TOLERANCE
    assert (before[-1] - after[-1]).abs().max() > 1e-3


def test_logits_have_the_shape_and_type_that_the_contract_states(related):
    model = models.build("causalmed", related.inputs)
    logits = model(collate(related.arrays, np.array([2, 1])))
    assert logits.shape == (2, 29, 11)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    assert (logits[0, 2:] == 0).all()


def test_batch_of_other_vocabularies_is_refused(related):
    model = models.build("causalmed", related.inputs)
    batch = collate(dataclasses.replace(related.arrays, sizes=(24, 16, 11)), np.array([0]))
    with pytest.raises(ArtifactError, match=r"built for .*\(23, 17, 11\).* have \(24, 16, 11\)"):
        model(batch)


def test_parameter_count_at_mimic3_sizes_is_the_published_one():
    sizes = (1958, 1430, 131)
    effects = np.zeros((sizes[0] + sizes[1], sizes[2]), np.float32)
    inputs = ModelInputs(sizes, effects, np.zeros((sizes[2], sizes[2]), np.bool_))
    model = models.build("causalmed", inputs)
    assert sum(p.numel() for p in model.parameters()) == 457_929


def test_same_seed_gives_the_same_weights_to_the_bit(related):
    a = models.build("causalmed", related.inputs, seed=5).state_dict()
    torch.manual_seed(99)
    b = models.build("causalmed", related.inputs, {}, seed=5).state_dict()
    c = models.build("causalmed", related.inputs, seed=6).state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embedding"], c["embedding"])
    # What follows from the inputs is not saved with the weights.
    model = models.build("causalmed", related.inputs)
    assert set(a) == {name for name, _ in model.named_parameters()}


def test_weights_start_as_stated(related):
    weights = models.build("causalmed", related.inputs, seed=0).state_dict()
    assert 0.099 < weights["embedding"].abs().max() <= 0.1
    assert torch.equal(weights["class_mask.mask"], torch.ones(3, 4, 64))
    assert torch.equal(weights["fusion"], torch.ones(3, 2))
    bound = np.sqrt(6 / 128)
    for layer in ("first", "second"):
        for name in ("weight", "root"):
            values = weights[f"heterogeneous.{layer}.{name}"]
            assert 0.99 * bound < values.abs().max() <= bound
            assert values.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
        assert not weights[f"heterogeneous.{layer}.bias"].any()


@pytest.fixture(scope="module")
def crowded(make_world):
    """Enough visits that every relation has an edge, and visits without effects all the same."""
    return _with_effects(make_world([1, 29, 2, 5, 3, 20, 20, 20]), 0.75)


def _gradients(build_eval, world, options):
    """Gradients of a loss in double precision, where what does not learn is clearly apart."""
    torch.manual_seed(0)
    model = build_eval("causalmed", world.inputs, _small({"dropout": 0.2, **options}))
    model.double().train()
    batch = collate(world.arrays, np.arange(world.arrays.num_patients))
    logits, targets = batch.flatten(model(batch)), batch.targets.double()
    torch.nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def _relations_that_cannot_learn(options):
    """Relations without a gradient, by parameter: no edge has the last class of either modality.

    An effect is at most 1 and the last class begins above it. Without virtual edges at later
    visits, virtual relations carry a zero vector into the first layer, and none at all where there
    is no first visit's slot.
    """
    levels = options.get("effect_levels", 5)
    last, virtual = {levels, 2 * levels + 1}, {0, levels + 1}
    never = options.get("virtual_edges") == "none"
    no_slot = not options.get("first_visit_slot", True)
    return {
        "heterogeneous.first.weight": last | (virtual if never else set()),
        "heterogeneous.second.weight": last | (virtual if never and no_slot else set()),
    }


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "many_levels"])
def test_gradients_reach_all_but_relations_without_edges(name, crowded, build_eval):
    gradients = _gradients(build_eval, crowded, VARIANTS[name])
    exceptions = _relations_that_cannot_learn(VARIANTS[name])
    for parameter, gradient in gradients.items():
        assert gradient is not None, parameter
        if parameter in exceptions:
            reached = gradient.abs().amax((1, 2)) > 1e-9
            unreached = set((~reached).nonzero()[:, 0].tolist())
            assert unreached == exceptions[parameter], parameter
            assert not gradient[sorted(unreached)].any()
        else:
            assert gradient.abs().max() > 1e-9, parameter
    assert (gradients["embedding"].abs().sum(1) > 0).all()  # 100 visits hold every code
    assert (gradients["class_mask.mask"].abs().sum(2) > 0).all()


@pytest.mark.parametrize("options", [{}, {"virtual_edges": "first"}])
def test_gradients_are_those_of_the_reference(options, related, build_eval, reference_causalmed):
    options = _small({"dropout": 0.0, **options})
    model = build_eval("causalmed", related.inputs, options).double().train()
    batch = collate(related.arrays, np.array([0, 2, 3, 4]))
    weight = torch.linspace(-1, 1, 11, dtype=torch.float64)
    (batch.flatten(model(batch)) * weight).sum().backward()
    leaves = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    values = dataclasses.asdict(config.from_mapping(CausalMedOptions, options, "model"))
    effects = torch.from_numpy(related.inputs.effects).double()
    total = sum(
        (
            reference_causalmed.patient_logits(
                leaves, effects, related.inputs.sizes, values, related.patients[p]
            )
            * weight
        ).sum()
        for p in (0, 2, 3, 4)
    )
    total.backward()
    for name, parameter in model.named_parameters():
        scale = leaves[name].grad.abs().max().clamp(min=1)
        assert (parameter.grad - leaves[name].grad).abs().max() < 1e-11 * scale, name


@pytest.mark.parametrize("shared", [True, False])
def test_dropout_is_drawn_once_or_twice_for_medications(shared, related):
    model = models.build("causalmed", related.inputs, _small({"dropout_shared": shared})).train()
    seen = {}
    model.class_mask.register_forward_pre_hook(
        lambda _, args: seen.update(homogeneous=args[0], modality=args[1])
    )
    model.heterogeneous.register_forward_pre_hook(
        lambda _, args: seen.update(heterogeneous=args[0])
    )
    torch.manual_seed(0)
    model(collate(related.arrays, np.arange(5)))
    same = ((seen["homogeneous"] == 0) == (seen["heterogeneous"] == 0)).all(1)
    is_medication = seen["modality"] == 2
    assert same[~is_medication].all()
    assert bool(same[is_medication].all()) is shared
    for rows in (seen["homogeneous"], seen["heterogeneous"]):
        assert abs(float((rows == 0).float().mean()) - 0.7) < 0.02


def test_evaluation_draws_no_dropout(related, logits_of):
    model = models.build("causalmed", related.inputs, _small({})).eval()
    first = logits_of(model, related.arrays, [0, 3])
    assert torch.equal(first, logits_of(model, related.arrays, [0, 3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_ratio": 4}, "model.reduction_ratio: unknown key; known keys: dimension"),
        ({"effect_levels": 1}, "model.effect_levels: expected a value in [2, 100], got 1"),
        ({"effect_sign": "both"}, "model.effect_sign: expected one of 'signed', 'absolute'"),
        ({"virtual_edges": True}, "model.virtual_edges: expected one of 'all', 'first', 'none'"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message, related):
    with pytest.raises(ConfigError) as caught:
        models.build("causalmed", related.inputs, options)
    assert str(caught.value).startswith(message)


def test_the_configuration_file_spells_out_the_defaults():
    written = yaml.safe_load((CONF_DIR / "model" / "causalmed.yaml").read_text())
    assert written.pop("name") == "causalmed"
    assert written == dataclasses.asdict(CausalMedOptions())


def test_learns_more_than_which_medications_are_frequent(make_world):
    # A medication is given if one of its two diagnoses is there or, seldom, by chance.
    world = make_world(
        [3] * 240, lambda rng: (rng.integers(2, 6), rng.integers(0, 3), rng.integers(1, 5))
    )
    arrays, rng = world.arrays, np.random.default_rng(1)
    wanted = rng.random(arrays.targets.shape) < 0.05
    effects = np.zeros_like(world.inputs.effects)
    for m in range(11):
        effects[2 * m : 2 * m + 2, m] = 0.7
    for v in range(arrays.num_visits):
        wanted[v, [c // 2 for c in arrays.codes[v, 0, : arrays.counts[v, 0]] if c < 22]] = True
    arrays = dataclasses.replace(arrays, targets=wanted)
    inputs = ModelInputs(world.inputs.sizes, effects, np.zeros_like(world.inputs.ddi))
    found = training.fit(
        models.build,
        "causalmed",
        _small({"dropout": 0.2}),
        inputs,
        arrays,
        np.arange(200),
        np.arange(200, 240),
        training.FitConfig(epochs=25, batch_size=16, learning_rate=0.01),
    )
    losses = [report.losses["loss"] for report in found.history]
    assert losses[-1] < 0.6 * losses[0]
    assert _jaccard_of_the_most_frequent(arrays) < 0.45
    assert found.metrics.jaccard > _jaccard_of_the_most_frequent(arrays) + 0.3
    model = models.build("causalmed", inputs, _small({"dropout": 0.2}))
    model.load_state_dict(found.weights)
    probabilities = predict(model, arrays, np.arange(200, 240))
    assert probabilities.shape == (120, 11)
    assert probabilities[arrays.targets[600:]].mean() > 0.7
    assert probabilities[~arrays.targets[600:]].mean() < 0.3


def _jaccard_of_the_most_frequent(arrays):
    """On the last 40 patients, the best of predicting the n most frequent for everyone."""
    ranking = np.argsort(-arrays.targets[:600].mean(0))
    best = 0.0
    for n in range(1, 12):
        chosen = np.isin(np.arange(11), ranking[:n])
        both = (arrays.targets[600:] & chosen).sum(1)
        best = max(best, float((both / (arrays.targets[600:] | chosen).sum(1)).mean()))
    return best
