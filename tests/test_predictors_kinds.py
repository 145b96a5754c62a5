"""Each kind of predictor alone: planted structure is found, noise is not, and numpy's scores are what the native operators compute."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
from predictor_harness import Array, made_up_layer, native_candidates

from predictors import lowrank, mlp, signbit
from predictors.allocate import LayerOptions, allocate
from predictors.calibrate import LayerSamples
from predictors.candidate_store import shelve
from predictors.choose_candidate import PRICES, Cost, Curve, Judged, Rule, judge
from predictors.margins import Margins, Scale, measure
from predictors.matrices import plain
from predictors.predictor import Candidate, FitOptions, Proposal
from predictors.registry import KINDS
from runtime.errors import UserError

F16, Q8_0, Q4_0 = Cost(512, 1024, 1024), Cost(272, 544, 1024), Cost(144, 288, 1024)  # bytes of a neuron of 256 elements
AUTO = FitOptions(("q4_0", "q8_0"))


Measured = list[tuple[Candidate, tuple[Scale, Margins, Margins]]]


def measured(layer: LayerSamples, kind: str) -> Measured:
    candidates = [proposal.make(None) for proposal in KINDS[kind](layer, AUTO)]
    return list(zip(candidates, measure(layer, candidates), strict=True))


def choose(layer: LayerSamples, found: Measured, cost: Cost, energy: float) -> tuple[Judged, int] | None:
    judged = [judge(candidate, margins, cost) for candidate, margins in found]
    return allocate([LayerOptions(judged, cost, float(layer.frequency.mean()))], energy)[0]


def chosen(layer: LayerSamples, cost: Cost, energy: float) -> tuple[Judged, int] | None:
    return choose(layer, measured(layer, "lowrank"), cost, energy)


def planted(rank: int, quantile: float, rng: np.random.Generator, ungated: str = "") -> LayerSamples:
    """A gate of rank `rank` with a bias, so that neurons fire where a Gaussian exceeds `quantile`."""
    gate = rng.normal(size=(1024, rank)) @ rng.normal(size=(rank, 256)) / np.sqrt(rank)
    return made_up_layer(gate, -quantile * np.linalg.norm(gate, axis=1), 3000, rng, ungated)


@pytest.mark.parametrize(("rank", "at_most"), [(20, 32), (32, 32), (40, 64)])
@pytest.mark.parametrize("quantile", [1.645, 0.524])
def test_lowrank_finds_planted_structure(rank: int, at_most: int, quantile: float) -> None:
    layer = planted(rank, quantile, np.random.default_rng(0))
    found = measured(layer, "lowrank")
    choice = choose(layer, [each for each in found if each[0].type == "q8_0"], F16, energy=0.9999999)
    assert choice is not None
    judged, price = choice
    assert judged.candidate.rank <= at_most
    assert judged.test.hits[price] / judged.test.fired >= 0.99
    assert judged.test.hits[price] / judged.test.predicted[price] >= 0.90
    of_all = choose(layer, found, F16, energy=0.9999999)  # four bits may do at rank 64: more candidates, fewer bytes
    assert of_all is not None and of_all[0].time[of_all[1]] <= judged.time[price]


@pytest.mark.parametrize("quantile", [0.0, 1.28])
def test_nothing_pays_on_noise(quantile: float) -> None:
    """Neither where half of the neurons fire, nor where one in ten does, whatever the rows' type."""
    rng = np.random.default_rng(0)
    gate = rng.normal(size=(1024, 256))
    layer = made_up_layer(gate, -quantile * np.linalg.norm(gate, axis=1), 3000, rng)
    for kind in ("lowrank", "signbit"):
        found = measured(layer, kind)
        assert all(choose(layer, found, cost, 0.997) is None for cost in (F16, Q8_0, Q4_0))


def test_the_same_layer_with_a_low_rank_pays() -> None:
    """What is refused on noise is not refused because of its numbers of tokens, neurons or bytes."""
    layer = planted(40, 1.28, np.random.default_rng(0))
    found = measured(layer, "lowrank")
    assert all(choose(layer, found, cost, 0.997) is not None for cost in (F16, Q8_0, Q4_0))


def test_all_of_the_energy_means_exact() -> None:
    assert chosen(planted(20, 1.645, np.random.default_rng(0)), F16, energy=1.0) is None


def test_less_energy_reads_less() -> None:
    layer = planted(40, 1.28, np.random.default_rng(1))
    read = []
    for energy in (0.9, 0.99, 0.999):
        choice = chosen(layer, F16, energy)
        assert choice is not None
        judged, price = choice
        assert judged.validation.energy[price] >= energy * judged.validation.total
        assert judged.test.energy[price] / judged.test.total == pytest.approx(energy, abs=0.3 * (1 - energy) + 1e-3)
        read.append(judged.time[price])
    assert read == sorted(read)


def test_the_energy_of_an_ungated_squared_relu_counts_squares() -> None:
    """What a neuron adds is the square of what its row says: a score that is twice as high is worth 16 times as much."""
    layer = planted(40, 1.28, np.random.default_rng(1), "relu2")
    gate, down = (np.float64(layer._rows(stem, 0, 1024)) for stem in ("ffn_up", "ffn_down_t"))
    part = layer.test
    said = np.float64(part.x) @ gate.T + np.float64(layer.gate_bias)
    expected = np.maximum(said, 0) ** 4 * (down**2).sum(1) * part.weight[:, None]
    found = layer.responses(part, 0, 1024)
    assert (found.fired != (said > 0)).mean() < 1e-5
    np.testing.assert_allclose(found.energy, expected, rtol=1e-3, atol=1e-5 * expected.max())


def test_squares_need_fewer_candidates_for_as_much_energy() -> None:
    """The same rows on the same inputs: with squares more of the energy is in what lies far above 0."""
    predicted = []
    for activation in ("relu", "relu2"):
        choice = chosen(planted(40, 0.5, np.random.default_rng(1), activation), F16, 0.99)
        assert choice is not None
        judged, price = choice
        assert judged.test.energy[price] / judged.test.total == pytest.approx(0.99, abs=5e-3)
        predicted.append(float(judged.test.predicted[price]))
    assert predicted[1] < 0.9 * predicted[0]


def only(proposals: Iterator[Proposal]) -> Candidate:
    (proposal,) = proposals
    return proposal.make(None)


def small_layer(rng: np.random.Generator) -> LayerSamples:
    gate = rng.normal(size=(192, 20)) @ rng.normal(size=(20, 256)) + 0.3 * rng.normal(size=(192, 256))
    return made_up_layer(gate, rng.normal(size=192), 600, rng)


def numpy_scores(candidate: Candidate, x: Array) -> Array:
    return candidate.scores(candidate.prepare(x), 0, 192)


@pytest.mark.native
@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    ("type_name", "n_tokens"), [(t, n) for t in ("q4_0", "q8_0", "f16", "f32") for n in (1, 5)] + [("f32", 70)]
)
@pytest.mark.parametrize("kind", ["lowrank", "mlp"])
def test_native_candidates_are_numpys(kind: str, type_name: str, n_tokens: int) -> None:
    """But for ties: ggml rounds what it multiplies with quantised rows to 8 bits."""
    rng = np.random.default_rng(2)
    layer, x = small_layer(rng), rng.normal(size=(n_tokens, 256)).astype(np.float32)
    candidate: Candidate = next(iter(lowrank.fit(layer, FitOptions((type_name,))))).make(None)
    if kind == "mlp":
        inner, outer = candidate.tensors
        candidate = mlp.Mlp((inner, outer), candidate.rank, type_name, (inner.floats(), outer.floats()))
    bias = -np.median(numpy_scores(candidate, rng.normal(size=(65, 256)).astype(np.float32)), axis=0)
    scores = numpy_scores(candidate, x)
    found = native_candidates(kind, candidate.tensors, bias, x)
    assert 0.2 < found.mean() < 0.8
    clear = np.abs(scores + bias) > (1e-3 if type_name.startswith("f") else 2e-2) * scores.std()
    assert clear.mean() > 0.9
    assert np.array_equal(found[clear], (scores + bias > 0)[clear])


@pytest.mark.native
@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n_tokens", [1, 7, 66])
def test_signbit_is_the_plain_reference_bit_for_bit(n_tokens: int, threads: int) -> None:
    rng = np.random.default_rng(3)
    layer, x = small_layer(rng), rng.normal(size=(n_tokens, 256)).astype(np.float32)
    x[:, ::17], x[:, 5] = 0.0, -0.0
    candidate = only(signbit.fit(layer, AUTO))
    rows = layer.gate_rows(0, 192)
    differing = np.array(
        [[sum(bool(a < 0) != bool(b < 0) for a, b in zip(t, w, strict=True)) for w in rows] for t in x]
    )
    assert np.array_equal(numpy_scores(candidate, x), -differing)
    for bias in (np.full(192, 128.0), np.full(192, 128.5), rng.integers(100, 150, 192).astype(np.float64)):
        found = native_candidates("signbit", candidate.tensors, bias, x, threads)
        assert np.array_equal(found, bias - differing > 0)


def test_signbit_packs_as_the_format_says() -> None:
    rows = np.ones((1, 16), np.float32)
    rows[0, [0, 3, 9]] = -1
    assert signbit.pack(rows).tolist() == [[0b1001, 0b10]]
    assert np.array_equal(signbit.unpack(signbit.pack(rows)), rows)
    assert list(signbit.fit(made_up_layer(np.ones((8, 12)), np.zeros(8), 4, np.random.default_rng(0)), AUTO)) == []


def test_signbit_leaves_a_neuron_that_it_knows_nothing_of_to_its_average() -> None:
    """A row whose signs say the contrary of its pre-activation does not get a rule that says so too."""
    rng = np.random.default_rng(4)
    gate = rng.normal(size=(64, 64)) * np.where(np.arange(64) == 0, 30.0, 1.0)  # one element decides
    layer = made_up_layer(gate, np.zeros(64), 2000, rng)
    candidate = only(signbit.fit(layer, AUTO))
    (scale, _, _) = measure(layer, [candidate])[0]
    assert (scale.slope > 0).all()
    assert np.isfinite(scale.bias(np.zeros(64, np.float32))).all()


def test_mlp_learns_and_repeats() -> None:
    pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    gate = rng.normal(size=(192, 16)) @ rng.normal(size=(16, 128)) / 4
    layer = made_up_layer(gate, -1.3 * np.linalg.norm(gate, axis=1), 3000, rng)
    first, second = (next(iter(mlp.fit(layer, FitOptions(("q8_0",), seed=7)))).make(None) for _ in range(2))
    assert all(np.array_equal(a.data, b.data) for a, b in zip(first.tensors, second.tensors, strict=True))
    judged = judge(first, measure(layer, [first])[0], Cost(256, 512, 192))
    price = int(np.searchsorted(judged.test.energy, 0.99 * judged.test.total))
    assert judged.test.predicted[price] < 0.3


def test_mlp_says_that_torch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="needs torch") as caught:
        list(mlp.fit(small_layer(np.random.default_rng(6)), AUTO))
    assert "lazyneuron[torch]" in caught.value.hint


def test_a_layer_too_narrow_for_the_type_gets_no_candidate() -> None:
    layer = made_up_layer(np.ones((64, 48)), np.zeros(64), 10, np.random.default_rng(0))
    assert list(lowrank.fit(layer, FitOptions(("q4_0",)))) == []
    assert plain("x", "i32", np.arange(3)).nbytes == 12


def test_candidates_wait_on_disk() -> None:
    layer = small_layer(np.random.default_rng(7))
    found = [judge(c, margins, Cost(256, 512, 192)) for c, margins in measured(layer, "lowrank")]
    shelved = shelve(found)
    assert shelve([]) == []
    for before, after in zip(found, shelved, strict=True):
        assert all(
            np.array_equal(a.data, b.data)
            for a, b in zip(before.candidate.tensors, after.candidate.tensors, strict=True)
        )
        assert all(isinstance(tensor.data, np.memmap) for tensor in after.candidate.tensors)
        assert (before.candidate.rank, before.candidate.type) == (after.candidate.rank, after.candidate.type)


# --- how layers share a budget ---------------------------------------------------------------------------------------


def made_up_options(time: float, lost: float) -> LayerOptions:
    """A layer of 1 energy that takes 100 exactly; its only candidate takes `time` and more, the less of `lost` it loses."""
    cost = Cost(gate=100, rest=0, n_ff=1)
    kept = 1 - lost / (1 + PRICES)
    curve = Curve(np.zeros(len(PRICES)), np.zeros(len(PRICES)), kept, 0.1, 1.0)
    rule = Rule(np.ones(1), np.zeros(97))
    candidate = plain("x", "f32", np.zeros(1))
    times = time + 30 * PRICES / (1 + PRICES)
    return LayerOptions([Judged(candidate, Scale.empty(1), rule, curve, curve, times)], cost, 0.1)  # type: ignore[arg-type]


def test_layers_share_a_budget() -> None:
    layers = [made_up_options(10, 0.05), made_up_options(20, 0.001), made_up_options(99, 0.001)]
    for energy in (0.98, 0.99, 0.9999):
        choices = allocate(layers, energy)
        assert choices[2] is None  # saves too little
        kept = [1.0 if c is None else c[0].validation.energy[c[1]] for c in choices]
        assert sum(kept) >= 3 * energy
    assert allocate(layers, 0.99)[1] is not None
    assert allocate([LayerOptions([], layers[0].cost, 0.1)], 0.9) == [None]


def test_a_layer_keeps_its_predictor_where_the_others_cannot_use_what_it_would_give_back() -> None:
    """At the price at which exact is better for the first layer, nothing else has anything left to gain."""
    layers = [made_up_options(50, 0.4), made_up_options(10, 0.0001)]
    choices = allocate(layers, 0.99)
    assert all(choice is not None for choice in choices)
