"""Rollouts between optimizer steps always use the current weights, whatever trains them."""

import pytest
import torch
from rollout_models import FAMILIES, forward_logprobs, greedy, prompts
from torch import nn

from flashpo.rollout import RolloutEngine, SamplingParams

peft = pytest.importorskip("peft")
PARAMS = SamplingParams(n=3, max_new_tokens=20)


def with_lora(model):
    """Two adapters that each move the logits by far more than rounding."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)
    model = peft.get_peft_model(model, config)
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def assert_logprobs(model, rollouts, atol=1e-5):
    training = model.training
    model.eval()
    for prompt, completion, logprobs in zip(rollouts.prompt_ids, rollouts.completion_ids, rollouts.logprobs):
        torch.testing.assert_close(
            torch.tensor(logprobs), forward_logprobs(model, prompt, completion), atol=atol, rtol=0
        )
    model.train(training)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_logprobs_follow_the_weights(family, lora):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    model = with_lora(model) if lora else model
    model.train()
    engine = RolloutEngine(model, fallback="error")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for _ in range(3):
        rollouts = engine.generate(prompts(10, 70), PARAMS)
        assert_logprobs(model, rollouts)
        assert rollouts.completion_ids not in seen
        seen.append(rollouts.completion_ids)
        assert model.training
        ids = torch.tensor([rollouts.prompt_ids[0] + rollouts.completion_ids[0]])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("lora", ["live", "merged"])
def test_greedy_under_an_adapter_is_generate(lora):
    torch.manual_seed(0)
    model = with_lora(FAMILIES["qwen3"]()).eval()
    asked = prompts(3, 64, 90)
    params = SamplingParams(temperature=0.0, max_new_tokens=40)
    chosen = RolloutEngine(model, lora=lora, fallback="error").generate(asked, params).completion_ids
    assert chosen == [greedy(model, prompt, 40) for prompt in asked]
    with model.disable_adapter():
        assert chosen != [greedy(model, prompt, 40) for prompt in asked], "the adapter changes nothing"


def test_several_adapters_answer_in_one_call():
    torch.manual_seed(0)
    model = with_lora(FAMILIES["qwen3"]())
    engine, asked = RolloutEngine(model, fallback="error"), prompts(30, 70, 30)
    names = ["other", "default", "default"]
    rollouts = engine.generate(asked, PARAMS, adapters=names)
    assert rollouts.prompt_index == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert model.active_adapter == "default"
    for i, name in enumerate(names):
        model.set_adapter(name)
        part = slice(3 * i, 3 * i + 3)
        for prompt, completion, logprobs in zip(
            rollouts.prompt_ids[part], rollouts.completion_ids[part], rollouts.logprobs[part]
        ):
            model.eval()
            exact = forward_logprobs(model, prompt, completion)
            torch.testing.assert_close(torch.tensor(logprobs), exact, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="adapters: no adapter 'third'"):
        engine.generate(asked, PARAMS, adapters=["third"] * 3)
    with pytest.raises(ValueError, match="adapters must have a name for each of 3 prompts, not 1"):
        engine.generate(asked, PARAMS, adapters=["other"])


def test_equal_prompts_of_different_adapters_share_nothing():
    torch.manual_seed(0)
    model = with_lora(FAMILIES["qwen3"]())
    engine, prompt = RolloutEngine(model, fallback="error"), prompts(130)[0]
    rollouts = engine.generate([prompt, prompt], PARAMS, adapters=["other", "default"])
    assert rollouts.stats.prefill_tokens == 260
    assert rollouts.completion_ids[:3] != rollouts.completion_ids[3:]


@pytest.mark.parametrize("named", [True, False])
def test_turns_of_agents_in_a_session(named):
    """An agent's turn goes on from what it has said and heard itself, never from what another adapter has cached."""
    torch.manual_seed(0)
    model = with_lora(FAMILIES["qwen3"]())
    engine = RolloutEngine(model, fallback="error", check=False)
    said, params = prompts(130)[0], SamplingParams(max_new_tokens=20)
    computed, turns = [], ("default", "other", "default", "other")
    with engine.session():
        for agent in turns:
            if not named:
                model.set_adapter(agent)
            rollouts = engine.generate([said], params, adapters=[agent] if named else None)
            model.set_adapter(agent)
            assert_logprobs(model, rollouts)
            computed.append(rollouts.stats.prefill_tokens)
            said = said + rollouts.completion_ids[0]
    # whole; whole; the other's turn and the last token of the own one, which had not been fed
    assert computed == [130, 150, 21, 21]


def test_an_fp32_head_on_a_bf16_model():
    """What TRL's cast_lm_head_to_fp32 makes of a model."""
    torch.manual_seed(0)
    model = FAMILIES["qwen3"]().to(torch.bfloat16).eval()
    model.lm_head = model.lm_head.float()
    hook = model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    engine = RolloutEngine(model, fallback="error")
    rollouts = engine.generate(prompts(40), PARAMS)
    assert engine.pool.runner.cache.dtype == torch.bfloat16
    assert_logprobs(model, rollouts, atol=0.3)
    hook.remove()


def test_autocast_computes_what_the_trainer_computes():
    """fp32 masters, forward in bf16: as near as two forwards of different shapes are to one another."""
    torch.manual_seed(0)
    model = FAMILIES["qwen3"]().train()
    engine = RolloutEngine(model, autocast=torch.bfloat16, fallback="error")
    rollouts = engine.generate(prompts(40, 70), PARAMS)
    cache = engine.pool.runner.cache
    assert cache.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters())
    model.eval()
    plain = RolloutEngine(model, fallback="error").generate(prompts(40, 70), PARAMS)
    gaps = []
    for prompt, completion, logprobs in zip(rollouts.prompt_ids, rollouts.completion_ids, rollouts.logprobs):
        with torch.autocast("cpu", torch.bfloat16):
            same = forward_logprobs(model, prompt, completion)
        exact = forward_logprobs(model, prompt, completion)
        gaps.append([(torch.tensor(logprobs) - x).abs().mean() for x in (same, exact)] + [(same - exact).abs().mean()])
    to_trainer, to_fp32, trainer_to_fp32 = torch.tensor(gaps).mean(0)
    assert to_trainer < 1.5 * trainer_to_fp32
    assert to_fp32 < 1.5 * trainer_to_fp32
    assert to_trainer > 0
    assert plain.logprobs != rollouts.logprobs
