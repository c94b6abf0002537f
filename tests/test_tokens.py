"""Solvers of masked tokens against exact laws of enumerated joints."""

import itertools
import math

import pytest
import torch

import fastsde
from fastsde import Status, tokens
from fastsde.tokens import (
    SINE,
    Ancestral,
    Blocks,
    ByConfidence,
    Cap,
    Critic,
    EntropyBudget,
    ExactTokens,
    FirstHitting,
    Loop,
    Masking,
    ReMDM,
    Rescale,
    TokenCritic,
    TokenModel,
    Unmask,
)


def random_joint(symbols, length, seed=1):
    """A joint far from uniform and from independent: Gamma(0.4) weights, normalised."""
    torch.manual_seed(seed)
    shape = (symbols,) * length
    return torch._standard_gamma(torch.full(shape, 0.4, dtype=torch.float64))


MODEL = ExactTokens(random_joint(3, 3))


def excess(samples, law):
    """Pearson's chi-square against a law, as a number of its standard deviations above its mean."""
    symbols, length = law.shape[0], law.ndim
    powers = symbols ** torch.arange(length - 1, -1, -1)
    counts = torch.bincount((samples * powers).sum(1), minlength=law.numel()).double()
    expected = law.flatten() * len(samples)
    rare = expected < 5  # pooled: the statistic is a chi-square for cells that are not too small
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    used = expected > 0
    free = int(used.sum()) - 1
    statistic = float(((counts - expected)[used] ** 2 / expected[used]).sum())
    return (statistic - free) / math.sqrt(2 * free)


N = 2500
"""Samples of a law of 27 sequences: some 100 of each."""


def draw(model, n=N, **options):
    result = fastsde.sample(model, n=n, seed=5, batch_size=n, **options)
    assert result.success.all()
    return result


def conditionals(joint, state):
    """p(x_l | known) with shape (L, K), by sums over the joint."""
    length, symbols = joint.ndim, joint.shape[0]
    index = tuple(slice(None) if v < 0 else slice(v, v + 1) for v in state)
    part = joint[index]
    rows = []
    for axis in range(length):
        p = part.movedim(axis, 0).flatten(1).sum(1) / part.sum()
        rows.append(p if state[axis] < 0 else torch.nn.functional.one_hot(torch.tensor(state[axis]), symbols).double())
    return torch.stack(rows)


def law_of_groups(joint, groups):
    """The law when groups of positions are drawn one after another, each independently given those before."""
    law = torch.zeros_like(joint)
    for x in itertools.product(range(joint.shape[0]), repeat=joint.ndim):
        state, p = [-1] * joint.ndim, 1.0
        for group in groups:
            known = conditionals(joint, state)
            for axis in group:
                p *= float(known[axis, x[axis]])
                state[axis] = x[axis]
        law[x] = p
    return law


def ancestral_law(joint, steps):
    """The mean over all ways in which positions fall into steps."""
    law, length = torch.zeros_like(joint), joint.ndim
    kinds = {}
    for fall in itertools.product(range(steps), repeat=length):
        groups = tuple(tuple(i for i in range(length) if fall[i] == k) for k in sorted(set(fall)))
        kinds[groups] = kinds.get(groups, 0) + 1
    for groups, count in kinds.items():
        law += count / steps**length * law_of_groups(joint, groups)
    return law


def confident_law(joint):
    """MaskGIT's without noise at one token a turn: all masks are drawn, the most likely draw is kept."""

    def go(state):
        masked = [i for i, v in enumerate(state) if v < 0]
        if not masked:
            return {tuple(state): 1.0}
        p, out = conditionals(joint, state), {}
        for values in itertools.product(range(joint.shape[0]), repeat=len(masked)):
            chance = math.prod(float(p[i, v]) for i, v in zip(masked, values, strict=True))
            best = max(range(len(masked)), key=lambda k: float(p[masked[k], values[k]]))
            following = list(state)
            following[masked[best]] = values[best]
            for end, q in go(following).items():
                out[end] = out.get(end, 0.0) + chance * q
        return out

    law = torch.zeros_like(joint)
    for x, p in go([-1] * joint.ndim).items():
        law[x] = p
    return law


# A chi-square of 26 cells is as large in 2 of 10^5 cases; wrong laws here are above 300.
LIMIT = 5.5


@pytest.mark.parametrize(
    "solver",
    [
        FirstHitting(),
        *(Unmask(order, steps=3) for order in ("random", "probability", "entropy", "margin", "halton")),
        EntropyBudget(0.0),
        Blocks(Unmask("random", steps=2), length=2),
        Blocks(EntropyBudget(0.0), length=1),
    ],
    ids=repr,
)
def test_one_token_at_a_time_in_an_order_of_the_state_has_the_law_of_the_data(solver):
    assert excess(draw(MODEL, solver=solver).samples, MODEL.joint) < LIMIT


def test_all_tokens_at_once_lose_the_total_correlation():
    product = law_of_groups(MODEL.joint, [(0, 1, 2)])
    lost = float((MODEL.joint * (MODEL.joint / product).log()).sum())
    assert lost == pytest.approx(MODEL.total_correlation, abs=1e-9)
    result = draw(MODEL, solver=Unmask(steps=1))
    assert excess(result.samples, product) < LIMIT < excess(result.samples, MODEL.joint)
    assert (result.nfe == 1).all()


def test_confidence_of_the_value_drawn_is_biased_as_computed_and_mended_by_noise():
    biased = confident_law(MODEL.joint)
    assert float((biased - MODEL.joint).abs().sum() / 2) > 0.2  # far above the sampling error
    plain = draw(MODEL, solver=Unmask("confidence", steps=3)).samples
    assert excess(plain, biased) < LIMIT
    hot = Unmask("confidence", steps=3, choice_temperature=1e4, annealed=False)
    assert excess(draw(MODEL, solver=hot).samples, MODEL.joint) < LIMIT


@pytest.mark.parametrize("steps", [2, 4])
def test_ancestral_sampling_has_the_law_of_its_steps(steps):
    law = ancestral_law(MODEL.joint, steps)
    assert excess(draw(MODEL, solver=Ancestral(steps)).samples, law) < LIMIT


def test_ancestral_sampling_is_of_order_one():
    errors = [float((ancestral_law(MODEL.joint, steps) - MODEL.joint).abs().sum() / 2) for steps in (8, 16)]
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.15)  # the next order is 1 / T smaller


@pytest.mark.long
def test_finer_grids_follow_the_same_events():
    """Where no two tokens fall into one step, the tokens are those of first hitting, bit for bit."""
    fine, exact = draw(MODEL, n=200, solver=Ancestral(64)), draw(MODEL, n=200, solver=FirstHitting())
    apart = fine.nfe == 3
    assert apart.double().mean() > 0.9  # three of 64 cells: 1 - 3/64 - .. = 0.95
    assert torch.equal(fine.samples[apart], exact.samples[apart])
    assert torch.equal(draw(MODEL, n=200, solver=Unmask("random", steps=3)).samples, exact.samples)


@pytest.mark.long
def test_ancestral_steps_call_the_network_only_where_a_token_is_drawn():
    model = TokenModel(lambda ids: torch.zeros(*ids.shape, 4), 4, event_shape=(16,))
    steps, n = 20, 400
    result = draw(model, n=n, solver=Ancestral(steps))
    # The mean number of steps that hold one of 16 uniforms, to four standard errors of less than 2 / sqrt(n).
    assert float(result.nfe.double().mean()) == pytest.approx(steps * (1 - (1 - 1 / steps) ** 16), abs=8 / math.sqrt(n))


RULES = [Cap(0.3), Rescale(1.0), Loop(0.2)]


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_remasking_keeps_the_share_of_known_tokens(rule):
    model = TokenModel(lambda ids: torch.zeros(*ids.shape, 4), 4, event_shape=(50,))
    n, solver = 200, ReMDM(rule, steps=10)
    paths = draw(model, n=n, solver=solver, trajectory=True).trajectory
    known = torch.stack([(path.x >= 0).double().mean(1) for path in paths]).mean(0)
    times = paths[0].t
    # Four standard errors of a share of 10,000 coins.
    assert known.tolist() == pytest.approx(rule.alpha(times).tolist(), abs=4 * 0.5 / 100)


@pytest.mark.long
@pytest.mark.parametrize("rule", [*RULES, ByConfidence()], ids=repr)
def test_remasking_is_exact_for_independent_tokens(rule):
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    model = ExactTokens(p[:, None, None] * p.flip(0)[:, None] * p)
    assert excess(draw(model, solver=ReMDM(rule, steps=6)).samples, model.joint) < LIMIT


@pytest.mark.parametrize(("order", "rtol"), [("entropy", 0.1), ("entropy", 0.6), ("random", 0.3), ("margin", 0.5)])
def test_the_loss_is_below_the_bound_and_the_bound_below_the_tolerance(order, rtol):
    result = draw(MODEL, solver=EntropyBudget(rtol, order))
    bound, entropy = (result.report[name] for name in ("bound", "entropy"))
    assert (bound <= rtol * entropy + 1e-9).all()
    q, law = MODEL.joint, (MODEL.law(result.samples) * N + 0.5) / (N + 13.5)
    lost = float(torch.where(q > 0, q * (q / law).log(), 0.0).sum())
    assert lost <= float(bound.mean()) + 0.02  # 27 cells: the estimate is 27 / 2 N too high, and noisy


def test_tolerance_is_calls():
    calls = [float(draw(MODEL, n=300, rtol=rtol).nfe.double().mean()) for rtol in (0.0, 0.2, 0.5, 1.0)]
    assert calls[0] == 3
    assert calls[-1] == 1
    assert calls == sorted(calls, reverse=True)


def test_the_bound_is_tight_for_a_copy():
    """Two equal symbols: the total correlation is ln 2, and so is the bound."""
    model = ExactTokens(torch.eye(2))
    result = draw(model, rtol=1.0)
    assert model.total_correlation == pytest.approx(math.log(2))
    assert result.report["bound"].tolist() == pytest.approx([math.log(2)] * N)
    assert torch.equal(draw(model, rtol=0.49).samples.diff(dim=1), torch.zeros(N, 1, dtype=torch.int64))


@pytest.mark.long
@pytest.mark.parametrize(
    ("steps", "table"),
    [
        (8, [251, 236, 212, 181, 142, 97, 49, 0]),
        (12, [253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33, 0]),
    ],
)
def test_masks_left_after_each_turn_are_those_of_maskgit(steps, table):
    """Of 256 tokens with the schedule cos(pi r / 2), whatever other rows are: one has a prompt."""
    model = TokenModel(lambda ids: torch.zeros(*ids.shape, 4), 4, event_shape=(16, 20), process=Masking(SINE))
    x = torch.full((2, 16, 20), 4)
    x[0, :, 16:] = 1
    for order in ("confidence", "halton"):
        paths = fastsde.sample(model, x_init=x, solver=Unmask(order, steps=steps), trajectory=True).trajectory
        assert (paths[0].x < 0).flatten(1).sum(1).tolist() == [256, *table]


def test_halton_order_covers_any_grid():
    for shape in ((5,), (3, 4), (64, 64), (2, 3, 4)):
        rank = tokens.unmask.halton_rank(shape)
        assert torch.equal(rank.sort().values, torch.arange(math.prod(shape)))


SOLVERS = [
    FirstHitting(),
    Ancestral(5),
    Unmask("entropy", steps=4),
    Unmask("confidence", steps=4, choice_temperature=2.0),
    EntropyBudget(0.2),
    ReMDM(Cap(0.2), steps=6),
    Blocks(Unmask("probability", steps=2), length=3),
    Blocks(EntropyBudget(0.3), length=2),
    TokenCritic(Critic(lambda ids: torch.sin(ids.double() + torch.arange(5))), steps=4),
]


@pytest.mark.long
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_sample_depends_on_seed_and_number_alone(solver):
    """Whatever the batch, the order, the others, and where in a queue it comes."""
    model = ExactTokens(random_joint(3, 5))
    full = fastsde.sample(model, n=5, seed=3, solver=solver)
    part = fastsde.sample(model, n=5, seed=3, solver=solver, batch_size=2)
    assert torch.equal(part.samples, full.samples)
    assert torch.equal(part.nfe, full.nfe)
    order = [4, 2]
    assert torch.equal(fastsde.sample(model, index=order, seed=3, solver=solver).samples, full.samples[order])
    assert not torch.equal(fastsde.sample(model, n=5, seed=4, solver=solver).samples, full.samples)


@pytest.mark.long
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_prompts_stay_and_do_not_change_other_rows(solver):
    """Known tokens, few or many and anywhere, keep their values; a row's own samples are those it has alone."""
    model = ExactTokens(random_joint(3, 5))
    x = torch.full((4, 5), model.mask_id)
    x[1, :2], x[2, 3], x[3, 1:] = 2, 0, torch.tensor([1, 0, 1, 2])
    mixed = fastsde.sample(model, x_init=x, seed=1, solver=solver)
    given = x != model.mask_id
    assert mixed.success.all()
    assert torch.equal(mixed.samples[given], x[given])
    assert (mixed.samples >= 0).all()
    for k in range(4):
        alone = fastsde.sample(model, x_init=x[k : k + 1], index=[k], seed=1, solver=solver)
        assert torch.equal(alone.samples[0], mixed.samples[k])
        assert int(alone.nfe) == int(mixed.nfe[k])


def test_a_prompt_conditions_the_law():
    x = torch.full((N, 3), MODEL.mask_id)
    x[:, 1] = 2
    samples = fastsde.sample(MODEL, x_init=x, solver=FirstHitting(), batch_size=N).samples
    law = MODEL.joint * (torch.arange(3) == 2).double()[:, None]
    assert excess(samples, law / law.sum()) < LIMIT


def test_rows_that_end_leave_the_batch():
    """A row with one token to draw costs one call; the network then sees the others alone."""
    seen = []

    def network(ids):
        seen.append(len(ids))
        return torch.zeros(*ids.shape, 4)

    model = TokenModel(network, 4, event_shape=(6,))
    x = torch.full((3, 6), 4)
    x[0, 1:] = 0
    result = fastsde.sample(model, x_init=x, solver=FirstHitting())
    assert result.nfe.tolist() == [1, 6, 6]
    assert seen == [3, 2, 2, 2, 2, 2]


def test_an_end_ends_its_sample_when_all_before_it_is_known():
    """Token 3 at position 2 is certain; positions 0 and 1 must still be drawn, what is behind costs nothing."""

    def network(ids):
        logits = torch.zeros(*ids.shape, 4)
        logits[..., 3] = -math.inf
        logits[:, 2] = torch.tensor([-math.inf, -math.inf, -math.inf, 0.0])
        return logits

    model = TokenModel(network, 4, event_shape=(10,), end_id=3)
    result = fastsde.sample(model, n=20, solver=Blocks(FirstHitting(), length=1))
    assert (result.nfe == 3).all()
    assert (result.samples[:, 2:] == 3).all()
    assert (result.samples[:, :2] < 3).all()
    assert result.success.all()


def test_blocks_are_finished_from_left_to_right():
    model = TokenModel(lambda ids: torch.zeros(*ids.shape, 4), 4, event_shape=(7,))
    x = torch.full((2, 7), 4)
    x[1, :2] = 1
    for inner in (Unmask("random", steps=2), EntropyBudget(0.0, "random")):
        paths = fastsde.sample(model, x_init=x, solver=Blocks(inner, length=3), trajectory=True).trajectory
        for path, start in zip(paths, (0, 2), strict=True):
            for state in path.x:
                parts = [(part >= 0) for part in state[start:].split(3)]
                begun = [k for k, part in enumerate(parts) if part.any()]
                assert all(part.all() for part in parts[: max(begun, default=0)])


def test_values_of_a_long_vocabulary_are_quantiles():
    """50,000 equal symbols: value k for u in [k / K, (k + 1) / K), in its tails too, where Gumbel noise is cut off."""
    size = 50_000
    u = torch.cat([torch.linspace(0.5 / size, 1 - 0.5 / size, 41), torch.tensor([2.0**-53, 1 - 2.0**-53])]).double()
    values, log_p = tokens.drawing.draw(torch.zeros(len(u), size), u)
    assert (values - (u * size).floor()).abs().max() <= 1  # a sum of 50,000 roundings may shift an end of an interval
    torch.testing.assert_close(log_p, torch.full_like(u, -math.log(size)))


def test_a_symbol_without_a_chance_is_never_drawn():
    p = torch.tensor([0.0, 1.0, 0.0, 1e-300, 1.0, 0.0])
    logits = p.log().expand(5000, 6)
    u = torch.linspace(2.0**-53, 1 - 2.0**-53, 5000, dtype=torch.float64)
    values, log_p = tokens.drawing.draw(logits, u)
    assert set(values.tolist()) <= {1, 4}
    assert torch.isfinite(log_p).all()
    greedy, _ = tokens.drawing.draw(torch.tensor([[0.0, 2.0, 1.0]]), u[:1], 0.0)
    assert greedy.tolist() == [1]


def test_a_colder_draw_is_that_of_the_tempered_law():
    logits = torch.tensor([0.3, -1.0, 0.9], dtype=torch.float64)
    model = TokenModel(lambda ids: logits.expand(*ids.shape, 3), 3, event_shape=(1,))
    samples = draw(model, solver=Unmask(steps=1, temperature=0.5)).samples
    assert excess(samples, torch.softmax(logits / 0.5, 0)) < LIMIT


def test_a_sample_that_runs_out_of_calls_keeps_its_masks():
    result = fastsde.sample(MODEL, n=5, solver=FirstHitting(), max_nfe=2)
    assert (result.status == Status.MAX_NFE).all()
    assert ((result.samples == tokens.MASK).sum(1) == 1).all()
    assert (result.nfe == 2).all()


def test_a_budget_of_calls_is_kept():
    model = ExactTokens(random_joint(3, 5))
    for solver in (None, Unmask("random"), Blocks(Unmask("random"), length=2), Ancestral(), ReMDM()):
        result = fastsde.sample(model, n=20, nfe=3, solver=solver)
        assert int(result.nfe.max()) <= 3
        assert result.success.all()


@pytest.mark.parametrize(
    "schedule",
    [
        tokens.LINEAR,
        tokens.SINE,
        tokens.ONE_MINUS_COSINE,
        tokens.SINE_SQUARED,
        tokens.ARCCOSINE,
        tokens.power(3.0),
        tokens.power(0.5),
        tokens.exponential(256),
    ],
    ids=repr,
)
def test_schedules_have_inverses_and_slopes(schedule):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    share = schedule.share(t)
    (slope,) = torch.autograd.grad(share.sum(), t)
    torch.testing.assert_close(schedule.slope(t), slope)
    torch.testing.assert_close(schedule.time(share), t, rtol=1e-6, atol=1e-9)
    ends = schedule.share(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_posterior_of_two_steps_is_that_of_one():
    """Chances to stay masked multiply: s / t r / s = r / t."""
    t, s, r = torch.tensor([[0.9], [0.5], [0.2]], dtype=torch.float64)
    process = Masking()
    stays = (1 - process.posterior(t, s)) * (1 - process.posterior(s, r))
    torch.testing.assert_close(stays, 1 - process.posterior(t, r))


def test_one_step_has_the_marginal_of_the_process():
    """Masks of a state at the time t of a schedule, to four standard errors of a share of 40,000 coins."""
    process, u = Masking(SINE), torch.rand(400, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.full((400,), 0.3, dtype=torch.float64)
    masked = process.mask(torch.zeros(400, 100, dtype=torch.int64), t, u) == tokens.MASK
    assert float(masked.double().mean()) == pytest.approx(math.sin(0.15 * math.pi), abs=4 * 0.5 / 200)
