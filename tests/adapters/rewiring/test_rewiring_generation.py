"""Generation in two phases: against a loop written out, alone and in batches, continued, kept short."""

import pytest
import torch
import torch.nn.functional as F

from adapter_models import ATTENTION, linear_layers, make_adapter, make_base
from anabranch.adapters.glider import GliderConfig, GliderPool, describe_expert
from anabranch.adapters.rewiring import Rerouter, Rewiring, rerouter
from anabranch.adapters.rewiring.vectors import Vectors, run
from anabranch.errors import CapacityError, ConfigError
from anabranch.lm import Decoder, SamplingConfig, generate, load_model
from anabranch.nn import MoE
from anabranch.routing import ExpertChoice, Router, TopK

MODEL = MoE.Config(num_experts=4, hidden_dim=16, router=Router.Config(select=TopK.Config(normalize="sum")))
GREEDY = SamplingConfig(max_tokens=12, temperature=0)
SHORT = GREEDY.replace(max_tokens=7)
QUICK = Rewiring(interval=5, steps=2, eta=0.5, scale_step=False)


def model_of(feed_forward=MODEL, **changes):
    body = {"vocab_size": 61, "dim": 16, "num_layers": 2, "init_std": 0.4, "depth_scaled_init": False}
    return Decoder.Config(**{**body, **changes}, feed_forward=feed_forward).build(seed=0).eval()


def text(length=40, seed=0):
    return torch.randint(61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def written_out(model, config, prompt, count):
    """The two phases without a cache: the whole text anew for each token, with the vectors of its phase."""
    turned = Rerouter(model, config)
    state, tokens = turned.new_state(), list(prompt)
    for number in range(count):
        if number == 0 or (config.interval and number % config.interval == 0):
            turned.adapt([tokens], [state])
        vectors = Vectors(turned.layers, [delta_E[None] for delta_E in state.delta], len(tokens))
        with torch.no_grad():
            tokens.append(int(run(model, torch.tensor([tokens]), None, vectors)[0, -1].argmax()))
    return tokens[len(prompt) :], state


def test_generation_is_the_two_phases_written_out():
    model, prompt = model_of(), text()
    expected, state = written_out(model, QUICK, prompt, 12)
    turned = Rerouter(model, QUICK)
    own = turned.new_state()
    assert turned.generate([prompt], GREEDY, states=[own]) == [expected]
    assert [phase.length for phase in own.phases] == [40, 45, 50]
    assert [phase.scale for phase in own.phases] == [phase.scale for phase in state.phases]
    for one, other in zip(own.delta, state.delta, strict=True):
        torch.testing.assert_close(one, other)
    assert not own.is_zero
    assert expected != generate(model, [prompt], GREEDY)[0]


def test_a_batch_with_other_lengths_and_ends_is_each_alone():
    model, prompts = model_of(), [text(), text(30, 1), text(47, 2)]
    alone = [written_out(model, QUICK, prompt, 12)[0] for prompt in prompts]
    assert Rerouter(model, QUICK).generate(prompts, GREEDY) == alone
    stop = alone[1][3]
    cut = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in alone]
    states = [Rerouter(model).new_state() for _ in prompts]
    assert Rerouter(model, QUICK).generate(prompts, GREEDY.replace(stop=(stop,)), states=states) == cut
    assert len(states[1].phases) == 1


def test_without_a_step_it_is_plain_generation_to_the_token():
    model, prompts = model_of(), [text(), text(30, 1)]
    sampled = SamplingConfig(max_tokens=20, temperature=1.0, top_k=20, top_p=0.9, seed=3)
    for cache in ("recompute", "keep"):
        config = Rewiring(most_steps=0, interval=4, cache=cache)
        assert Rerouter(model, config).generate(prompts, sampled) == generate(model, prompts, sampled)


def test_an_interval_without_end_is_the_prompt_alone():
    model, prompt, seen = model_of(), text(), []
    for interval in (None, 10**6, 12):
        turned = Rerouter(model, QUICK.replace(interval=interval))
        state = turned.new_state()
        seen.append((turned.generate([prompt], GREEDY, states=[state]), [one.tolist() for one in state.delta]))
        assert len(state.phases) == 1
    assert seen[0] == seen[1] == seen[2]


def test_tokens_come_as_they_are_made():
    model, prompts = model_of(), [text(), text(30, 1)]
    turned = Rerouter(model, QUICK)
    states = [turned.new_state() for _ in prompts]
    steps = turned.stream(prompts, GREEDY, states=states)
    first = [next(steps) for _ in range(5)]
    assert [len(state.phases) for state in states] == [1, 1]  # the second phase comes with the sixth token
    steps_left = list(steps)
    assert [len(state.phases) for state in states] == [3, 3]
    whole = turned.generate(prompts, GREEDY)
    for row in (0, 1):
        assert [step.tokens[step.rows.index(row)] for step in [*first, *steps_left]] == whole[row]


def test_chains_of_one_prompt_are_fitted_once_and_go_on_apart(monkeypatch):
    model, calls = model_of(), []
    fit = rerouter.fit
    monkeypatch.setattr(rerouter, "fit", lambda *a, **k: calls.append(len(a[3])) or fit(*a, **k))
    turned = Rerouter(model, QUICK)
    prompts = [text(), text(), text(30, 1), text()]
    states = [turned.new_state() for _ in prompts]
    sampling = SamplingConfig(max_tokens=12, temperature=2.0, seed=1)
    chains = turned.generate(prompts, sampling, states=states)
    assert calls == [2, 4, 4]
    assert chains[0] != chains[1]
    assert [len(state.phases) for state in states] == [3] * 4
    assert states[0].phases[0] == states[3].phases[0]
    assert len({id(state.delta[0]) for state in states}) == 4
    used = turned.new_state()
    used.steps = 1
    turned.generate([text(), text()], GREEDY.replace(max_tokens=1), states=[used, turned.new_state()])
    assert calls[-1] == 2  # a state that is not new is its own


def test_a_conversation_goes_on_from_what_was_saved():
    model, prompt = model_of(), text()
    turned = Rerouter(model, QUICK)
    state = turned.new_state()
    answer = turned.generate([prompt], GREEDY, states=[state])[0]
    other = turned.new_state()
    other.load_state_dict(state.state_dict())
    following = [*prompt, *answer, 3, 4]
    assert turned.generate([following], GREEDY, states=[other]) == turned.generate([following], GREEDY, states=[state])
    assert other.steps == state.steps == 12
    fresh = turned.new_state()
    fresh_tokens = turned.generate([following], GREEDY, states=[fresh])
    state.reset()
    assert turned.generate([following], GREEDY, states=[state]) == fresh_tokens


def test_kept_keys_and_values_are_those_of_the_old_vectors():
    """The prompt's, but for its last token, are of the model as it is; a phase later those of before stay too."""
    model, prompt, config = model_of(), text(), QUICK.replace(cache="keep", guard=False)
    turned = Rerouter(model, config)
    state, tokens = turned.new_state(), list(prompt)
    cache, layers = model.new_cache(60), turned.layers
    with torch.no_grad():
        model(torch.tensor([prompt[:-1]]), cache=cache)
    for number in range(12):
        if number % 5 == 0:
            turned.adapt([tokens], [state])
        vectors = Vectors(layers, [delta_E[None] for delta_E in state.delta], 1)
        with torch.no_grad():
            tokens.append(int(run(model, torch.tensor([tokens[-1:]]), None, vectors, cache=cache)[0, -1].argmax()))
    assert turned.generate([prompt], GREEDY) == [tokens[40:]]
    assert Rerouter(model, config.replace(cache="recompute")).generate([prompt], GREEDY) != [tokens[40:]]


@pytest.mark.parametrize("prompts", [[[5]], [[5], [6, 7]], [[5], text()]])
def test_prompts_of_one_token_with_kept_keys_and_values(prompts):
    config = QUICK.replace(cache="keep", most_steps=0)
    assert Rerouter(model_of(), config).generate(prompts, GREEDY) == generate(model_of(), prompts, GREEDY)


def test_no_more_room_is_reserved_than_texts_come_to(monkeypatch):
    model, made = model_of(), []
    monkeypatch.setattr(rerouter, "_LEAST_ROOM", 4)
    new = type(model).new_cache
    monkeypatch.setattr(type(model), "new_cache", lambda self, length: made.append(length) or new(self, length))
    config = Rewiring(most_steps=0)
    prompts = [[1, 2, 3]]
    tokens = Rerouter(model, config).generate(prompts, GREEDY.replace(max_tokens=20))
    assert made == [7, 16, 23]  # with twice the room once it is full, and never above what may come
    monkeypatch.undo()
    assert tokens == generate(model, prompts, GREEDY.replace(max_tokens=20))
    with pytest.raises(CapacityError, match="keys and values of 1000000000002 positions would take"):
        next(Rerouter(model, config.replace(cache="keep")).stream(prompts, SamplingConfig(max_tokens=10**12 - 1)))


def test_what_cannot_generate_is_refused_before_anything_runs():
    router = Router.Config(select=ExpertChoice.Config(), balance=())
    model = model_of(MoE.Config(num_experts=4, hidden_dim=16, router=router))
    with pytest.raises(ConfigError, match="looking at later tokens"):
        next(Rerouter(model).stream([text()]))
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        next(Rerouter(model_of()).stream([text(), []]))
    assert Rerouter(model_of()).generate([]) == []
    assert Rerouter(model_of()).generate([text()], GREEDY.replace(max_tokens=0)) == [[]]


def test_a_stream_that_is_left_leaves_the_model_as_it_was():
    model = model_of().train()
    steps = Rerouter(model, QUICK).stream([text()], GREEDY)
    next(steps)
    steps.close()
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_streams_beside_each_other_are_each_alone_and_keep_modes():
    """The first to end leaves the other in evaluation, and the last leaves each module in the mode it was in."""
    model, modes = model_of().train(), []
    model.blocks[1].register_forward_hook(lambda block, args, output: modes.append(block.training))
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    turned = Rerouter(model, QUICK)
    alone = turned.generate([text(30, 1)], GREEDY)[0]
    first = turned.stream([text()], GREEDY.replace(max_tokens=2))
    second = turned.stream([text(30, 1)], GREEDY)
    found = next(second).tokens
    list(first)
    found += [token for step in second for token in step.tokens]
    assert found == alone
    assert modes
    assert not any(modes)
    turned.adapt([text()], [turned.new_state()])
    assert {name: module.training for name, module in model.named_modules()} == before


def test_what_rows_are_told_is_followed(tmp_path):
    """Queries of a pool: one for all rows, in phase 1 and in phase 2."""
    base = make_base(tmp_path / "base", "olmoe")
    for name in ("sql", "law"):
        make_adapter(tmp_path / "pool" / name, linear_layers(base, ATTENTION), seed=name)
        describe_expert(tmp_path / "pool" / name, instruction=f"It is about {name}.")
    pool = GliderPool.load(tmp_path / "pool", GliderConfig(weight=100.0, top_k=1))
    model = pool.onto(load_model(tmp_path / "base")[0].eval())
    prompts = [text(40), text(30, 1)]
    still, turned = (Rerouter(model, QUICK.replace(guard=False, most_steps=most)) for most in (0, None))
    found, losses = [], []
    for name in ("sql", "law"):
        with pool.answering([name]):
            found.append(still.generate(prompts, GREEDY))
            assert found[-1] == generate(model, prompts, GREEDY)
            states = [turned.new_state() for _ in prompts]
            turned.adapt(prompts, states)
            losses.append([state.phases[0].loss_before for state in states])
            token_BL = torch.tensor(prompts[:1])
            plain = F.cross_entropy(model(token_BL).logits_BLV[0, :-1], token_BL[0, 1:])
            assert losses[-1][0] == pytest.approx(float(plain), rel=1e-4)
    assert found[0] != found[1]
    assert losses[0] != losses[1]
    with pool.answering(["sql", "law"]):
        with pytest.raises(
            ConfigError, match="2 queries are told to the rows of the model, and a rerouter has 3 texts"
        ):
            turned.generate([*prompts, text(3)], GREEDY)
        with pytest.raises(ConfigError, match="tell one for each, or one for all"):
            turned.adapt(prompts[:1], [turned.new_state()])
        # Scoring is a plain pass of the model's.
        with turned.attached(turned.new_state()):
            model(torch.tensor([text(5), text(5, 1)]))
    turned.generate(prompts, GREEDY.replace(max_tokens=1))


def test_in_inference_mode_too():
    model = model_of()
    with torch.inference_mode():
        found = Rerouter(model, QUICK).generate([text()], GREEDY)
        made_inside = model_of()
    assert found == Rerouter(model_of(), QUICK).generate([text()], GREEDY)
    with pytest.raises(ConfigError, match="made in inference mode"):
        Rerouter(made_inside, QUICK).generate([text()], GREEDY)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    """A model with a pool on it, whose queries matter much."""
    place = tmp_path_factory.mktemp("pooled")
    base = make_base(place / "base", "olmoe")
    for name in ("sql", "law", "sum"):
        make_adapter(place / "pool" / name, linear_layers(base, ATTENTION), seed=name)
        describe_expert(place / "pool" / name, instruction=f"It is about {name}.")
    pool = GliderPool.load(place / "pool", GliderConfig(weight=100.0, top_k=1))
    return pool, pool.onto(load_model(place / "base")[0].eval())


@pytest.mark.parametrize("changes", [{"cache": "keep"}, {"guard": False, "interval": 2}], ids=str)
def test_each_text_is_told_something_of_its_own(pooled, changes):
    """Tokens, vectors and reports are those of each text alone, told alone; also where rows leave, and where texts are too short to fit."""
    pool, model = pooled
    turned = Rerouter(model, QUICK.replace(**changes))
    prompts, queries = [text(30), text(1, 2), text(24, 1), text(30)], ["sql", "law", "sum", "law"]
    alone = []
    for prompt, query in zip(prompts, queries, strict=True):
        with pool.answering([query]):
            alone.append(turned.generate([prompt], SHORT)[0])
    # A row that stops leaves the others what they were told.
    stops = SHORT.replace(stop=(alone[0][1],))
    states = [turned.new_state() for _ in prompts]
    with pool.answering(queries):
        found = turned.generate(prompts, stops, states=states)
    for own, mine in zip(found, alone, strict=True):
        cut = mine.index(alone[0][1]) if alone[0][1] in mine else len(mine)
        assert own == mine[:cut]
    # Equal texts that are told other things are fitted apart.
    with pool.answering(queries):
        together = [turned.new_state() for _ in prompts]
        turned.adapt(prompts, together)
    for prompt, query, state in zip(prompts, queries, together, strict=True):
        own = turned.new_state()
        with pool.answering([query]):
            turned.adapt([prompt], [own])
        assert (own.phases[0].skipped is None) == (len(prompt) > 1)
        assert own.phases[0].loss_before in (None, pytest.approx(state.phases[0].loss_before or 0, rel=1e-4))
        for mine_E, all_E in zip(own.delta, state.delta, strict=True):
            torch.testing.assert_close(mine_E, all_E, rtol=1e-3, atol=1e-4)
    assert together[0].phases[0].loss_before != pytest.approx(together[3].phases[0].loss_before, rel=1e-4)


def test_equal_chains_that_are_told_other_things_are_not_fitted_as_one(pooled, monkeypatch):
    pool, model = pooled
    turned, seen, fit = Rerouter(model, QUICK), [], rerouter.fit
    monkeypatch.setattr(rerouter, "fit", lambda *a, **k: seen.append(len(a[3])) or fit(*a, **k))
    for queries, batch in ((["sql", "sql", "law"], 2), (["sql"], 1)):
        with pool.answering(queries):
            found = turned.generate([text(30)] * 3, GREEDY.replace(max_tokens=3))
        assert seen.pop() == batch
        assert found[0] == found[1]
    assert not seen


def test_a_block_that_ends_or_changes_in_the_middle_is_told(pooled):
    pool, model = pooled
    turned = Rerouter(model, QUICK)
    with pool.answering(["sql", "law"]):
        steps = turned.stream([text(20), text(20, 1)], GREEDY)
        next(steps)
    next(steps)
    with pool.answering(["a", "b", "c"]), pytest.raises(ConfigError, match="3 queries are told"):
        next(steps)
