"""A model that changes after its engine was made: the next call behaves as that of a new engine."""

import itertools

import pytest
import torch
from rollout_models import FAMILIES, VOCAB, forward_logprobs, prompts
from torch import nn

from flashpo.rollout import RolloutEngine, SamplingParams, seam

PARAMS = SamplingParams(n=2, max_new_tokens=12, seed=3)


def net(family="qwen3", **changes):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def larger(model):
    model.resize_token_embeddings(VOCAB + 40, mean_resizing=False)
    nn.init.normal_(model.lm_head.weight[VOCAB:].data, std=2)


def tied(model):
    model.config.tie_word_embeddings = True
    model.tie_weights()


def new_head(model):
    model.lm_head = nn.Linear(64, VOCAB, bias=True)


def new_embedding(model):
    model.set_input_embeddings(nn.Embedding(VOCAB, 64))


def new_layer(model):
    model.model.layers[1] = net("qwen3").model.layers[0]
    model.model.layers[1].self_attn.layer_idx = 1


def fewer_layers(model):
    del model.model.layers[1]
    model.config.num_hidden_layers, model.config.layer_types = 1, model.config.layer_types[:1]


def softcap(model):
    model.config.final_logit_softcapping = 1.0


def bfloat16(model):
    model.to(torch.bfloat16)


CHANGES = [("qwen3", change) for change in (larger, tied, new_head, new_embedding, new_layer, fewer_layers, bfloat16)]
CHANGES += [("gemma2", softcap), ("gemma2", bfloat16)]


@pytest.mark.parametrize(("family", "change"), CHANGES)
def test_the_next_call_is_a_new_engines(family, change):
    model, asked = net(family), prompts(9, 70)
    living = RolloutEngine(model, fallback="error")
    before = living.generate(asked, PARAMS)
    torch.manual_seed(1)
    change(model)
    after, fresh = (engine.generate(asked, PARAMS) for engine in (living, RolloutEngine(model, fallback="error")))
    assert after.completion_ids == fresh.completion_ids
    assert after.logprobs == fresh.logprobs
    assert after.logprobs != before.logprobs
    exact = torch.cat([forward_logprobs(model, *x) for x in zip(after.prompt_ids, after.completion_ids)]).double()
    off = (torch.tensor(list(itertools.chain(*after.logprobs)), dtype=torch.float64) - exact).abs()
    assert off.median() < (0.1 if change is bfloat16 else 1e-4)
    if change is larger:
        assert any(token >= VOCAB for completion in after.completion_ids for token in completion)
        assert living.generate([[VOCAB + 1]], PARAMS).prompt_ids[0] == [VOCAB + 1]


def test_a_session_ends_where_the_model_changes():
    model = net()
    engine = RolloutEngine(model, fallback="error", check=False)
    with engine.session():
        engine.generate(prompts(9), PARAMS)
        new_head(model)
        with pytest.raises(RuntimeError, match="changed within a session"):
            engine.generate(prompts(9), PARAMS)
    assert len(engine.generate(prompts(9), PARAMS)) == 2


def test_what_trainers_set_is_no_change():
    model = net()
    engine = RolloutEngine(model, fallback="error", check=False)
    engine.generate(prompts(9), PARAMS)
    runner = engine.pool.runner
    model.train()
    model.config.use_cache, model.config.eos_token_id = False, 5
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    engine.generate(prompts(9), PARAMS)
    assert engine.pool.runner is runner


def subclass(model):
    class Own(type(model)):
        def generate(self, *args, **keywords):
            return super().generate(*args, **keywords)

    model.__class__ = Own


def on_the_instance(model):
    model.generate = type(model).generate.__get__(model)


@pytest.mark.parametrize("own", [subclass, on_the_instance])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_generate_of_its_own_is_called(own, wrapped, caplog):
    import peft

    model, calls = net(), []
    engine = RolloutEngine(model, check=False)
    outer = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])) if wrapped else model
    assert RolloutEngine(outer, check=False).support.ok, "PEFT's generate calls the model's"
    whole = RolloutEngine(outer, fallback="error", check=False).generate(prompts(9), PARAMS)
    own(model)
    with pytest.raises(seam.Unsupported, match="has a generate of its own"):
        RolloutEngine(outer, fallback="error")
    plainly = type(model).generate
    model.generate = lambda *args, **keywords: calls.append(keywords) or plainly(model, *args, **keywords)
    assert RolloutEngine(outer).generate(prompts(9), PARAMS).completion_ids == whole.completion_ids
    assert len(calls) == 1
    if not wrapped:
        engine.generate(prompts(9), PARAMS)
        assert "has a generate of its own" in caplog.text
        assert len(calls) == 2


def test_a_generate_that_draws_by_itself_is_told():
    model = net()
    model.generate = lambda input_ids, **keywords: input_ids
    with pytest.raises(seam.Unsupported, match="does not sample with the logits processor"):
        RolloutEngine(model).generate(prompts(9), PARAMS)
