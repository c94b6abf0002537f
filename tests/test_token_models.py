"""Readings of token networks, parity with published loops, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastsde
from fastsde import Status, tokens
from fastsde.noise import FreshNoise
from fastsde.tokens import (
    SINE,
    Blocks,
    Critic,
    EntropyBudget,
    ExactTokens,
    FirstHitting,
    Masking,
    ReMDM,
    TokenCritic,
    TokenGuidance,
    TokenModel,
    Unmask,
    from_amused,
    from_transformers,
)


class Table(nn.Module):
    """Logits from an embedding and a mean over the row: depends on all positions, on no time and on no other row."""

    def __init__(self, ids, outputs, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mix = nn.Embedding(ids, 8), nn.Linear(8, outputs)

    def forward(self, ids, label=None):
        x = self.embed(ids)
        x = 2 * x + torch.roll(x, 1, 1) + x.mean(1, keepdim=True)
        x = x if label is None else x + label.reshape(-1, *(1,) * (x.ndim - 1))
        return self.mix(torch.tanh(x)) * 3


def logits_of(model, x, share=1.0):
    return model(x, torch.full((len(x),), share, dtype=torch.float64))


def test_the_mask_has_no_chance_whether_the_network_gives_it_one_or_not():
    inside, behind = Table(6, 6), Table(6, 6)
    x = torch.tensor([[-1, 2, 0, -1]])
    mine = logits_of(TokenModel(inside, 6, 3), x)
    assert mine.shape == (1, 4, 6)
    assert (mine[..., 3] == -math.inf).all()
    assert logits_of(TokenModel(behind, 5), x).shape == (1, 4, 5)  # the column behind the vocabulary is cut


def test_layouts_and_containers_say_the_same():
    table, x = Table(6, 5), torch.randint(5, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    plain = logits_of(TokenModel(table, 5), x)
    for network, options in (
        (lambda ids: table(ids).movedim(-1, 1), {"channels_first": True}),
        (lambda ids: table(ids).flatten(1, 2), {}),
        (lambda ids: SimpleNamespace(logits=table(ids)), {}),
        (lambda ids: (table(ids), None), {}),
    ):
        assert torch.equal(logits_of(TokenModel(network, 5, **options), x), plain)


def test_shifted_logits_predict_the_next_position():
    table, x = Table(6, 5), torch.tensor([[0, 1, -1, 3]])
    plain, shifted = logits_of(TokenModel(table, 5), x), logits_of(TokenModel(table, 5, shift=True), x)
    assert torch.equal(shifted[:, 1:], plain[:, :-1])
    assert torch.equal(shifted[:, 0], plain[:, 0])


def test_a_network_with_time_is_told_the_time_of_what_is_masked():
    """3 of 4 free positions, then 2 and 1: the inverse of sin(pi t / 2)."""
    times = []

    def network(ids, t):
        times.append(t)
        return torch.zeros(*ids.shape, 5)

    model = TokenModel(network, 5, event_shape=(5,), process=Masking(SINE), timestep=lambda t: 1000 * t)
    x = torch.tensor([[5, 5, 2, 5, 5]])
    fastsde.sample(model, x_init=x, solver=FirstHitting())
    expected = [1000 * math.asin(k / 4) / (math.pi / 2) for k in (4, 3, 2, 1)]
    assert torch.cat(times).tolist() == pytest.approx(expected, rel=1e-6)  # float32


def test_guidance_is_the_line_through_both_predictions_and_counts_two_calls():
    table = Table(6, 5)
    model = TokenModel(table, 5, event_shape=(4,))
    guided = TokenGuidance(model, 3.0, negative={"label": -1.0})
    x, share = torch.tensor([[-1, 2, 0, -1]]), torch.ones(1, dtype=torch.float64)
    cond = {"label": torch.ones(1)}
    out = guided(x, share, cond | {"negative_label": -torch.ones(1)})
    yes, no = model(x, share, cond), model(x, share, {"label": -torch.ones(1)})
    torch.testing.assert_close(out, no + 3 * (yes - no))
    result = fastsde.sample(guided, n=3, cond={"label": torch.ones(3)}, solver=FirstHitting())
    assert (result.nfe == 8).all()
    assert (fastsde.sample(guided, n=3, cond={"label": torch.ones(3)}, nfe=4).nfe == 4).all()


def test_guidance_may_hide_the_prompt():
    """LLaDA's: the other half sees masks at the prompt."""
    seen = []

    def network(ids):
        seen.append(ids.clone())
        return torch.zeros(*ids.shape, 5)

    model = TokenGuidance(TokenModel(network, 5, event_shape=(3,)), 2.0, mask_prompt=True)
    fastsde.sample(model, x_init=torch.tensor([[1, 5, 5]]), solver=Unmask("random", steps=2))
    first, second = seen
    assert first.tolist() == [[1, 5, 5], [5, 5, 5]]
    assert second[0, 0] == 1
    assert second[1, 0] == 5
    assert torch.equal(second[0, 1:], second[1, 1:])


def test_conditioning_travels_with_its_sample():
    """Each row's label is the only symbol that it can draw."""

    def network(ids, label):
        return torch.where(torch.arange(7) == label[:, None, None], 0.0, -math.inf).expand(*ids.shape, 7)

    labels = torch.arange(7)
    model = TokenModel(network, 7, event_shape=(3,))
    result = fastsde.sample(model, n=7, cond={"label": labels}, batch_size=2, solver=EntropyBudget(0.0))
    assert torch.equal(result.samples, labels[:, None].expand(7, 3))


def test_padding_changes_nothing_where_the_network_ignores_it():
    """Positions that are given, behind the end of a row: the same tokens as without them, at mixed lengths."""

    def network(ids, attention_mask):
        kept = attention_mask[..., None].double()
        x = nn.functional.one_hot(ids, 6).double() * kept
        return (x.sum(1, keepdim=True) + x).float() @ torch.arange(30.0).reshape(6, 5).sin() * 2

    model = TokenModel(network, 5)
    for solver in (FirstHitting(), EntropyBudget(0.3), Unmask("confidence", steps=3), Blocks(FirstHitting(), length=2)):
        short = fastsde.sample(
            model, x_init=torch.full((1, 4), 5), cond={"attention_mask": torch.ones(1, 4)}, seed=2, solver=solver
        )
        x = torch.full((2, 7), 5)
        x[0, 4:] = 0
        mask = (torch.arange(7) < torch.tensor([[4], [7]])).float()
        long = fastsde.sample(model, x_init=x, cond={"attention_mask": mask}, seed=2, solver=solver)
        if not isinstance(solver, Blocks):  # whose number follows the length of the canvas; their order does not
            assert int(long.nfe[0]) == int(short.nfe[0])
        assert torch.equal(long.samples[0, :4], short.samples[0])


def critic_by_position(value=5.0):
    """Says that odd positions are original."""
    return Critic(lambda x, **cond: (torch.arange(x[0].numel()) % 2 * 2.0 - 1) * value + 0.0 * x.flatten(1))


def test_a_critic_keeps_what_it_believes_and_costs_a_call():
    model = TokenModel(lambda ids: torch.zeros(*ids.shape, 5), 5, event_shape=(8,))
    solver = TokenCritic(critic_by_position(), steps=4, scale=0.0)
    result = fastsde.sample(model, n=3, solver=solver, trajectory=True)
    assert (result.nfe == 4 + 3).all()  # the last turn keeps all
    for path in result.trajectory:
        left = (path.x < 0).sum(1).tolist()
        assert left == [8, 6, 4, 2, 0]
        half = path.x[2] >= 0
        assert half.tolist() == [False, True] * 4
    assert (fastsde.sample(model, n=3, solver=TokenCritic(critic_by_position()), nfe=9).nfe == 9).all()


def test_a_critic_takes_old_tokens_back():
    """It believes in odd positions first, then in even ones: what was kept goes."""
    turn = []

    def network(x):
        turn.append(0)
        return (torch.arange(8) % 2 * 2.0 - 1).expand(len(x), 8) * (1 if len(turn) == 1 else -1)

    model = TokenModel(lambda ids: torch.zeros(*ids.shape, 5), 5, event_shape=(8,))
    grid = fastsde.Grid([1.0, 0.5, 0.4, 0.0])
    solver = TokenCritic(Critic(network), scale=0.0)
    path = fastsde.sample(model, n=1, solver=solver, controller=grid, trajectory=True).trajectory[0]
    assert (path.x[1] >= 0).tolist() == [False, True] * 4
    assert (path.x[2] >= 0).tolist()[::2] == [True] * 4


def test_the_best_critic_beats_maskgit_on_an_exact_law():
    """Bayes' critic of an enumerated law: nearer to the data than the order by confidence, at as many turns."""
    torch.manual_seed(1)
    model = ExactTokens(torch._standard_gamma(torch.full((3, 3, 3), 0.4, dtype=torch.float64)))
    x_0, q = model.sequences, model.joint.flatten()
    masks = torch.tensor([[bool(k >> i & 1) for i in range(3)] for k in range(1, 8)])  # what is generated
    weight, original = torch.zeros(27), torch.zeros(27, 3)
    for mask in masks:
        state = x_0.masked_fill(mask, tokens.MASK)
        p = logits_of(model, state).softmax(-1)  # (27, 3, 3)
        chance = torch.ones(27, 27, dtype=torch.float64)  # from data i to completion j
        for axis in range(3):
            same = x_0[:, None, axis] == x_0[None, :, axis]
            chance = chance * (p[:, axis][:, x_0[:, axis]] if mask[axis] else same.double())
        joint = (q[:, None] * chance).sum(0).float()
        weight += joint
        original += joint[:, None] * (~mask).float()
    logit = torch.logit((original / weight[:, None]).clamp(1e-6, 1 - 1e-6))
    powers = torch.tensor([9, 3, 1])
    critic = Critic(lambda x: logit[(x * powers).sum(1)])
    grid = fastsde.Grid([1.0, 0.67, 0.34, 0.0])

    def distance(solver):
        samples = fastsde.sample(model, n=4000, batch_size=4000, solver=solver, controller=grid, seed=1).samples
        return float((model.law(samples) - model.joint).abs().sum() / 2)

    assert distance(TokenCritic(critic, scale=1.0)) < distance(Unmask("confidence"))


def test_amused_scheduler_takes_the_same_steps(monkeypatch):
    """Counts, ranks and values of diffusers' scheduler with the same uniforms, and its temperature held constant."""
    pytest.importorskip("diffusers")
    from diffusers import AmusedScheduler
    from diffusers.schedulers import scheduling_amused

    torch.manual_seed(0)
    table, side, steps, turn = Table(12, 10), 4, 5, [0]
    noise, index = FreshNoise(3, (side, side), torch.int64), torch.arange(2)

    def uniform(k):
        return noise.uniform(index, torch.full((2,), turn[0]), k).flatten(1)

    def multinomial(p, count, generator=None):
        mass = p.double().cumsum(-1)
        return torch.searchsorted(mass, uniform(0).reshape(-1, 1) * mass[:, -1:], right=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    monkeypatch.setattr(scheduling_amused, "gumbel_noise", lambda t, generator=None: -(-uniform(3).log()).log())
    scheduler = AmusedScheduler(mask_token_id=11)
    scheduler.set_timesteps(steps, temperature=(2, 2))
    x, states = torch.full((2, side, side), 11), []
    for t in scheduler.timesteps:
        turn[0] += 1
        x = scheduler.step(table(x).movedim(-1, 1), t, x).prev_sample
        states.append(x.masked_fill(x == 11, tokens.MASK))
    monkeypatch.undo()

    model = TokenModel(table, 10, 11, event_shape=(side, side), process=Masking(SINE))
    # V may be the vocabulary alone: the mask's id is above it.
    solver = Unmask("confidence", steps=steps, choice_temperature=2.0, annealed=False)
    result = fastsde.sample(model, n=2, seed=3, solver=solver, trajectory=True)
    for k, path in enumerate(result.trajectory):
        assert torch.equal(path.x[1:], torch.stack([state[k] for state in states]))


def test_llada_loop_takes_the_same_steps():
    """Greedy values, lowest confidence first to be masked again, blocks of 4 after a prompt of 3, 2 steps a block."""
    table, mask = Table(12, 12), 11
    x = torch.full((2, 11), mask)
    x[:, :3] = torch.tensor([[1, 2, 3], [4, 0, 9]])
    start = x.clone()
    for block in range(2):
        end = 3 + 4 * (block + 1)
        for _ in range(2):
            p = table(x).double().masked_fill(torch.arange(12) == mask, -math.inf).softmax(-1)
            best, value = p.max(-1)
            best = best.masked_fill(x != mask, -1.0)
            best[:, end:] = -1.0
            chosen = best.topk(2, 1).indices
            x = x.scatter(1, chosen, value.gather(1, chosen))
    model = TokenModel(table, 12, mask)
    solver = Blocks(Unmask("confidence", steps=2, temperature=0.0), length=4)
    assert torch.equal(fastsde.sample(model, x_init=start, solver=solver).samples, x)


def test_reading_of_a_network_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    network = transformers.BertForMaskedLM(config).eval()
    with pytest.raises(ValueError, match="mask_id"):
        from_transformers(network)
    model = from_transformers(network, 4)
    x = torch.tensor([[7, 4, 4, 9]])
    logits = logits_of(model, torch.tensor([[7, -1, -1, 9]]))
    with torch.no_grad():
        plain = network(x).logits
    torch.testing.assert_close(logits[..., [0, 1, 2, 3, *range(5, 20)]], plain[..., [0, 1, 2, 3, *range(5, 20)]])
    short, long = x, torch.tensor([[7, 4, 4, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    a = fastsde.sample(model, x_init=short, solver=FirstHitting(), cond={"attention_mask": mask[:, :4]}, seed=1).samples
    b = fastsde.sample(model, x_init=long, solver=FirstHitting(), cond={"attention_mask": mask}, seed=1).samples
    assert torch.equal(a[0], b[0, :4])


class Family(Table):
    """A stand-in for a language model of a family, told by its configuration."""

    def __init__(self, model_type, ids=10, **config):
        super().__init__(ids, ids)
        self.config = SimpleNamespace(model_type=model_type, vocab_size=ids, **config)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=super().forward(input_ids))


class Timed(Family):
    def forward(self, input_ids, timesteps):
        assert (timesteps == 0).all()
        return super().forward(input_ids)


@pytest.mark.parametrize(
    ("network", "mask_id", "shift"),
    [
        (Family("LLaDAModelLM", mask_token_id=9), 9, False),
        (Family("llada", ids=126400), 126336, False),
        (Family("Dream", mask_token_id=8), 8, True),
        (Timed("mdlm"), 9, False),
    ],
)
def test_families_are_read_by_their_configuration(network, mask_id, shift):
    model = from_transformers(network)
    assert model.mask_id == mask_id
    x = torch.tensor([[1, -1, 2, -1]])
    logits = logits_of(model, x)
    assert (logits[..., mask_id] == -math.inf).all()
    plain = Table.forward(network, x.masked_fill(x < 0, mask_id))
    expected = torch.cat([plain[:, :1], plain[:, :-1]], 1) if shift else plain
    torch.testing.assert_close(logits[..., :8], expected[..., :8])


def test_amused_transformer_is_read_as_its_pipeline_calls_it():
    pytest.importorskip("diffusers")
    from tiny_other_pipelines import amused

    pipe, _ = amused()
    net = pipe.transformer.eval()
    model = from_amused(net, pipe.scheduler.config.mask_token_id, event_shape=(4, 4))
    cond = {
        "encoder_hidden_states": torch.randn(2, 5, net.config.encoder_hidden_size),
        "pooled_text_emb": torch.randn(2, net.config.cond_embed_dim),
        "micro_conds": torch.tensor([[512.0, 512, 0, 0, 6]] * 2),
    }
    x = torch.randint(net.config.codebook_size, (2, 4, 4))
    x[0] = tokens.MASK
    with torch.no_grad():
        logits = model(x, torch.ones(2, dtype=torch.float64), cond)
        plain = net(x.masked_fill(x < 0, model.mask_id), **cond)
    torch.testing.assert_close(logits, plain.flatten(2).transpose(1, 2))
    result = fastsde.sample(model, n=2, cond=cond, nfe=3, solver=Unmask("confidence", choice_temperature=2.0))
    assert result.success.all()
    assert int(result.samples.max()) < net.config.codebook_size


MODEL = TokenModel(Table(6, 5), 5, event_shape=(4,))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"x_init": torch.zeros(2, 4, dtype=torch.int64)}, "leaves nothing to draw in 2 of 2 rows"),
        ({"x_init": torch.tensor([[5, 5, 7, 0]])}, "tokens from 0 to 4"),
        ({"x_init": torch.zeros(2, 4)}, "must be integers"),
        ({"x_init": torch.full((2, 3), 5)}, "shape"),
        ({"n": 2, "atol": 0.1}, "takes no atol"),
        ({"n": 2, "dtype": torch.float32}, "takes no dtype"),
        ({"n": 2, "solver": fastsde.DDIM(steps=3)}, "solver must be one for tokens"),
        ({"n": 2, "solver": Unmask()}, "number of steps"),
        ({"n": 2, "solver": Unmask(steps=2), "nfe": 3}, "nfe or the solver's steps"),
        ({"n": 2, "solver": FirstHitting(), "nfe": 3}, "decides itself"),
        ({"n": 2, "solver": ReMDM(), "rtol": 0.1}, "takes no rtol"),
        ({"n": 2, "solver": Unmask("confidence"), "rtol": 0.1}, "values drawn"),
        ({"n": 2, "rtol": 1.5}, "rtol must be in"),
        ({"n": 2, "rtol": 0.1, "nfe": 4}, "give one of"),
        ({"n": 2, "controller": fastsde.Grid([0.9, 0.0]), "solver": Unmask()}, "from 1 to 0"),
        ({"n": 2, "solver": TokenCritic(Critic(lambda x: x, (5,)), steps=2)}, "critic is for tokens of shape"),
        ({"n": 2, "cond": {"text": torch.zeros(2)}}, "cannot be called"),
        ({"shape": (2, 5)}, "samples have shape"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_requests_are_refused_before_the_first_call(options, said):
    calls = []
    table = Table(6, 5)
    model = TokenModel(lambda ids: calls.append(0) or table(ids), 5, event_shape=(4,))
    with pytest.raises((ValueError, TypeError), match=said):
        fastsde.sample(model, **options)
    assert not calls


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TokenModel(Table(6, 5), 1), "vocabulary must be"),
        (lambda: TokenModel(Table(6, 5), 5, -1), "mask_id must be"),
        (lambda: TokenModel(Table(6, 5), 5, 3, end_id=3), "end_id must be"),
        (lambda: TokenModel("network", 5), "must be callable"),
        (lambda: Unmask("critic"), "TokenCritic"),
        (lambda: Unmask("best"), "order must be one of"),
        (lambda: Unmask("entropy", choice_temperature=1.0), "choice_temperature is for"),
        (lambda: Unmask(temperature=-1.0), "temperature must be"),
        (lambda: EntropyBudget(-0.1), "rtol must be"),
        (lambda: Blocks(ReMDM(), 4), "inner must be"),
        (lambda: TokenCritic(lambda x: x), "critic must be"),
        (lambda: TokenGuidance(MODEL, 2.0), "negative="),
        (lambda: ExactTokens(torch.tensor([[0.5, -0.1], [0.3, 0.3]])), "probabilities"),
        (lambda: tokens.Cap(1.5), "eta must be"),
        (lambda: tokens.Loop(on=0.2, off=0.3), "off must be"),
        (lambda: tokens.power(0.0), "p must be"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_parts_are_refused(make, said):
    with pytest.raises((ValueError, TypeError), match=said):
        make()


@pytest.mark.parametrize("columns", [4, 6, 7])
def test_another_vocabulary_is_refused_at_the_first_call(columns):
    model = TokenModel(Table(12, columns), 5, 9, event_shape=(4,))  # a mask elsewhere: no further column
    with pytest.raises(ValueError, match="V = 5"):
        fastsde.sample(model, n=2)


def test_a_critic_of_another_length_is_refused():
    critic = Critic(lambda x: torch.zeros(len(x), 3))
    with pytest.raises(ValueError, match="a logit for each of"):
        fastsde.sample(MODEL, n=2, solver=TokenCritic(critic, steps=2))


SOLVERS = [
    FirstHitting(),
    tokens.Ancestral(3),
    Unmask(steps=2),
    Unmask("confidence", steps=2),
    EntropyBudget(0.3),
    ReMDM(steps=3),
    Blocks(Unmask(steps=1), 2),
    TokenCritic(critic_by_position(), steps=2),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_row_without_a_law_fails_alone(solver):
    """NaN, or no symbol with a chance, in the rows with labels 1 and 2: their status says so, the others finish."""
    table = Table(6, 5)

    def network(ids, label):
        logits = table(ids)
        logits[label == 1] = torch.nan
        logits[label == 2] = -math.inf
        return logits

    label = torch.tensor([0, 1, 0, 2, 0])
    model = TokenModel(network, 5, event_shape=(4,))
    result = fastsde.sample(model, n=5, cond={"label": label}, solver=solver)
    lost = label > 0
    assert (result.status[lost] == Status.NON_FINITE).all()
    assert (result.samples[lost] == tokens.MASK).all()
    clean = fastsde.sample(TokenModel(table, 5, event_shape=(4,)), n=5, solver=solver)
    assert torch.equal(result.samples[~lost], clean.samples[~lost])


def test_a_critic_that_is_no_number_ends_its_row_alone():
    critic = Critic(lambda x: torch.where(torch.arange(len(x))[:, None] == 1, torch.nan, 0.0) + 0.0 * x)
    result = fastsde.sample(MODEL, n=3, solver=TokenCritic(critic, steps=2))
    assert result.counts() == {"SUCCESS": 2, "NON_FINITE": 1}


def test_what_is_finished_is_kept_when_the_network_fails():
    calls = []

    def network(ids):
        calls.append(0)
        if len(calls) > 4:
            raise RuntimeError("power cut")
        return torch.zeros(*ids.shape, 5)

    model = TokenModel(network, 5, event_shape=(4,))
    with pytest.raises(fastsde.SamplingError) as caught:
        fastsde.sample(model, n=4, batch_size=2, solver=FirstHitting())
    result = caught.value.result
    assert result.counts() == {"PENDING": 2, "SUCCESS": 2}
    assert (result.samples[2:] == tokens.MASK).all()


def test_the_manual_has_the_traits_of_every_solver(pytestconfig):
    text = (pytestconfig.rootpath / "docs" / "howto" / "tokens.md").read_text()
    for solver in tokens.SOLVERS:
        calls = solver.cost or solver.calls_per_step
        row = f"| `{solver.__name__}` | {solver.convergence} | {calls} | {solver.exact} | {solver.use} |"
        assert row in text
