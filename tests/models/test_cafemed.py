"""CafeMed against its one-visit-at-a-time reference, and what must not change its answer."""

import dataclasses

import numpy as np
import pytest
import torch

import models
from cafemed import config
from cafemed.batches import ModelInputs, collate
from models.cafemed import CafeMedOptions

# float32 over some hundred additions of numbers near 1; the logits are of order 1.
TOLERANCE = 1e-5

VARIANTS = {
    "default": {},
    "learnable_modulation": {"learnable_modulation": True},
    "strength": {"modulation_strength": 2.0},
    "cwg_hidden": {"cwg_hidden": 5},
    "cwg_activation": {"cwg_activation": "tanh"},
    "cwg_shared": {"cwg_shared": False},
    "cwg_context": {"cwg_context": "visit"},
    "standardise": {"standardise_effects": True},
    "absolute": {"effect_aggregate": "absolute"},
    "medication_weight": {"medication_weight": "zero"},
    "width": {"layout": "width", "reduction_ratio": 2},
    "width_unshuffle_position": {"layout": "width", "unshuffle": True, "gate": "position"},
    "width_full": {"layout": "width", "kernel_storage": "full"},
    "reduction_ratio": {"reduction_ratio": 8},
    "no_shuffle": {"shuffle_groups": 1},
    "six_groups": {"shuffle_groups": 6},
    "unshuffle": {"unshuffle": True, "shuffle_groups": 6},
    "full_kernel": {"kernel_storage": "full"},
    "norm_affine": {"norm_affine": True},
    "gate_position": {"gate": "position"},
    "gate_position_input": {"gate": "position", "gate_place": "input"},
    "gate_none": {"gate": "none"},
    "gate_input": {"gate_place": "input"},
    "no_first_visit_slot": {"first_visit_slot": False},
    "modulated_homogeneous": {"homogeneous_input": "modulated"},
    "single_state": {"duplicate_state": False},
    "published": {"direct": "none"},
    "additive": {"direct": "additive"},
    "without_cwg": {"use_cwg": False},
    "without_charm": {"use_charm": False},
    "without_both": {"use_cwg": False, "use_charm": False},
}


def _expected(reference, model, world, options, patients):
    values = dataclasses.asdict(config.from_mapping(CafeMedOptions, options, "model"))
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
def test_batched_equals_one_visit_at_a_time(name, world, build_eval, reference_cafemed, logits_of):
    options = _small(VARIANTS[name])
    model = build_eval("cafemed", world.inputs, options)
    patients = [0, 1, 2, 3, 4] if name == "default" else [0, 2, 3, 4]
    expected = _expected(reference_cafemed, model, world, options, patients)
    got = logits_of(model, world.arrays, patients).double()
    assert (got - expected).abs().max() < TOLERANCE
    # In double precision only the rounding of w (float32) is left, so small slips show as well.
    got = logits_of(model.double(), world.arrays, patients)
    assert (got - expected).abs().max() < 1e-7


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "default"])
def test_option_changes_the_answer_or_the_parameters(name, world, build_eval, logits_of):
    # In double precision, so that a small effect cannot be mistaken for rounding.
    model = build_eval("cafemed", world.inputs, _small(VARIANTS[name])).double()
    plain = build_eval("cafemed", world.inputs, _small({})).double()
    shared = {k: v for k, v in plain.state_dict().items() if k in model.state_dict()}
    same_shape = {k: v for k, v in shared.items() if v.shape == model.state_dict()[k].shape}
    model.load_state_dict(same_shape, strict=False)
    differs = (logits_of(model, world.arrays, [3]) - logits_of(plain, world.arrays, [3])).abs()
    fewer_or_more = {k: v.shape for k, v in model.named_parameters()} != {
        k: v.shape for k, v in plain.named_parameters()
    }
    assert fewer_or_more or differs.max() > 1e-6


def test_equal_at_the_papers_dimension_over_lengths_1_to_30(
    make_world, reference_cafemed, logits_of
):
    world = make_world(
        range(1, 31), lambda rng: (rng.integers(1, 4), rng.integers(0, 3), rng.integers(1, 4))
    )
    model = models.build("cafemed", world.inputs, seed=3).eval()
    patients = [0, 1, 6, 13, 22, 29]
    expected = _expected(reference_cafemed, model, world, {}, patients)
    together = logits_of(model, world.arrays, np.arange(30))
    rows = np.concatenate([np.arange(*world.arrays.patient_offsets[p : p + 2]) for p in patients])
    assert (together[rows].double() - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "counts",
    [(1, 0, 1), (1, 1, 1), (6, 0, 3), (1, 0, 9), (0, 0, 4), (0, 0, 0), (0, 5, 1), (4, 2, 0)],
)
@pytest.mark.parametrize("layout", ["channels", "width"])
def test_equal_for_visits_with_few_or_no_codes(
    counts, layout, make_world, build_eval, reference_cafemed, logits_of
):
    world = make_world([1, 3], lambda _: counts)
    options = _small({"layout": layout})
    model = build_eval("cafemed", world.inputs, options)
    expected = _expected(reference_cafemed, model, world, options, [0, 1])
    got = logits_of(model, world.arrays, [0, 1]).double()
    assert (got - expected).abs().max() < TOLERANCE


def test_permuting_patients_changes_nothing(world, build_eval, logits_of):
    model = build_eval("cafemed", world.inputs, _small({}))
    alone = {p: logits_of(model, world.arrays, [p]) for p in range(5)}
    for order in ([0, 1, 2, 3, 4], [4, 1, 0, 3, 2], [1, 0]):
        expected = torch.cat([alone[p] for p in order])
        got = logits_of(model, world.arrays, order)
        assert (got - expected).abs().max() < TOLERANCE


def test_padding_content_changes_nothing(world, build_eval):
    model = build_eval("cafemed", world.inputs, _small({}))
    batch = collate(world.arrays, np.arange(5))
    place = torch.arange(batch.codes.shape[2])
    padding = place >= batch.counts[:, :, None]
    generator = torch.Generator().manual_seed(0)
    random_ids = torch.stack(
        [
            torch.randint(n, batch.codes[:, 0].shape, generator=generator)
            for n in world.inputs.sizes
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


def test_sex_and_age_do_not_enter(world, build_eval):
    model = build_eval("cafemed", world.inputs, _small({}))
    batch = collate(world.arrays, np.arange(5))
    other = dataclasses.replace(batch, sex=batch.sex + 1, age=torch.full_like(batch.age, 50.0))
    assert torch.isnan(batch.age).all()
    with torch.no_grad():
        assert torch.equal(model(other), model(batch))


def test_logits_of_a_visit_do_not_depend_on_later_visits(make_world, build_eval, logits_of):
    world = make_world([4])
    model = build_eval("cafemed", world.inputs, _small({}))
    before = logits_of(model, world.arrays, [0])
    codes = world.arrays.codes.copy()
    codes[3] = (codes[3] + 1) % np.array(world.inputs.sizes)[:, None]
    after = logits_of(model, dataclasses.replace(world.arrays, codes=codes), [0])
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3], after[3])


def test_logits_have_the_shape_and_type_that_the_contract_states(world):
    model = models.build("cafemed", world.inputs)
    logits = model(collate(world.arrays, np.array([2, 1])))
    assert logits.shape == (2, 29, 11)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


def test_parameter_count_at_mimic3_sizes():
    sizes = (1958, 1430, 131)
    effects = np.zeros((sizes[0] + sizes[1], sizes[2]), np.float32)
    inputs = ModelInputs(sizes, effects, np.zeros((sizes[2], sizes[2]), np.bool_))
    for options, expected in (
        ({}, 501_801 + sum(sizes) * sizes[2]),
        ({"direct": "none"}, 501_801),
        ({"direct": "none", "kernel_storage": "full"}, 1_275_945),
    ):
        model = models.build("cafemed", inputs, options)
        assert sum(p.numel() for p in model.parameters()) == expected


def _gradients(build_eval, world, options):
    """Gradients of a loss in double precision, where what does not learn is clearly apart."""
    torch.manual_seed(0)
    model = build_eval("cafemed", world.inputs, _small({"dropout": 0.2, **options}))
    model.double().train()
    batch = collate(world.arrays, np.arange(5))
    logits, targets = batch.flatten(model(batch)), batch.targets.double()
    torch.nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


# IN subtracts each channel's mean, and with it the bias of the convolution before it.
BEFORE_NORM = {
    "charm.spatial_attention.first.bias",
    "charm.spatial_attention.second.bias",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter_but_biases_before_a_norm(name, world, build_eval):
    gradients = _gradients(build_eval, world, VARIANTS[name])
    for parameter, gradient in gradients.items():
        assert gradient is not None, parameter
        largest = float(gradient.abs().max())
        if parameter in BEFORE_NORM:
            assert largest < 1e-15, parameter
        else:
            assert largest > 1e-9, parameter


def test_gradients_reach_every_embedding_row_that_occurs(world, build_eval):
    gradient = _gradients(build_eval, world, {})["embedding"]
    reached = gradient.abs().sum(1) > 0
    assert reached.all()  # 40 visits hold every code of this small world


def test_unused_columns_of_a_full_kernel_never_learn(world, build_eval):
    gradients = _gradients(build_eval, world, {"kernel_storage": "full"})
    columns = gradients["charm.spatial_attention.first.weight"]
    columns = columns.abs().amax((0, 1, 2))
    assert (columns > 0).tolist() == [False] * 3 + [True] + [False] * 3


@pytest.mark.parametrize(
    "options", [{}, {"cwg_shared": False}, {"cwg_context": "visit"}, {"direct": "additive"}]
)
def test_gradients_are_those_of_the_reference(options, world, reference_cafemed):
    options = _small({"dropout": 0.0} | options)
    model = models.build("cafemed", world.inputs, options).train()
    batch = collate(world.arrays, np.array([0, 2, 4]))
    weight = torch.linspace(-1, 1, 11)
    (batch.flatten(model(batch)) * weight).sum().backward()
    leaves = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    values = dataclasses.asdict(config.from_mapping(CafeMedOptions, options, "model"))
    effects = torch.from_numpy(world.inputs.effects).double()
    total = sum(
        (
            reference_cafemed.patient_logits(
                leaves, effects, world.inputs.sizes, values, world.patients[p]
            )
            * weight
        ).sum()
        for p in (0, 2, 4)
    )
    total.backward()
    for name, parameter in model.named_parameters():
        scale = leaves[name].grad.abs().max().clamp(min=1)
        assert (parameter.grad - leaves[name].grad).abs().max() < 2e-5 * scale, name


@pytest.mark.parametrize("shared", [True, False])
def test_dropout_is_drawn_once_or_twice_for_medications(shared, world):
    model = models.build("cafemed", world.inputs, _small({"dropout_shared": shared})).train()
    seen = {}
    model.class_mask.register_forward_pre_hook(lambda _, args: seen.update(raw=args[0]))
    model.charm.register_forward_pre_hook(lambda _, args: seen.update(modulated=args[0]))
    torch.manual_seed(0)
    batch = collate(world.arrays, np.arange(5))
    prepared = model.prepare(batch)
    model(batch, prepared)
    same = ((seen["raw"] == 0) == (seen["modulated"] == 0)).all(1)
    is_medication = prepared.modality == 2
    assert same[~is_medication].all()
    assert bool(same[is_medication].all()) is shared
    share = (seen["raw"] == 0).float().mean()
    assert abs(float(share) - 0.7) < 0.02


def test_evaluation_draws_no_dropout(world, logits_of):
    model = models.build("cafemed", world.inputs, _small({})).eval()
    first = logits_of(model, world.arrays, [0, 3])
    assert torch.equal(first, logits_of(model, world.arrays, [0, 3]))


def test_alpha_is_saved_only_if_it_is_learned(world):
    fixed = models.build("cafemed", world.inputs, _small({}))
    learned = models.build("cafemed", world.inputs, _small({"learnable_modulation": True}))
    assert "cwg.strength" not in fixed.state_dict()
    assert float(learned.state_dict()["cwg.strength"].detach()) == pytest.approx(0.1)
    # What follows from the inputs is not saved with the weights.
    assert set(fixed.state_dict()) == {name for name, _ in fixed.named_parameters()}
