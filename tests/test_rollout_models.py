"""Model families on the engine: what they answer, which are refused and why, and that the self-check finds errors."""

import copy
import dataclasses
import re
import warnings

import pytest
import torch

pytest.importorskip("transformers")
from rollout_models import assert_same_draws, greedy
from transformers import CONFIG_MAPPING, AttentionInterface

import flashpo
from flashpo._causal_lm import CausalLM
from flashpo._twin import small_config, small_model
from flashpo.bench.tiny_models import tiny_config, tiny_model
from flashpo.rollout import RolloutEngine, SamplingParams, engine, parity, seam, support
from flashpo.rollout.prefill import Packed
from flashpo.rollout.runner import Step

FAMILIES = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "mistral", "phi3", "phimoe", "olmo2", "gpt_oss",
    "deepseek_v3", "gemma4_text", "cohere2", "nemotron",
)  # fmt: skip
HYBRIDS = ("qwen3_next", "qwen3_5_text", "lfm2", "olmo_hybrid", "granitemoehybrid", "falcon_h1", "kimi_linear")
THEIR_OWN_STEP = ("lfm2", "falcon_h1")  # only convolutions; a function for single tokens that is given no keywords


def prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 97, (n,), generator=generator).tolist() for n in lengths]


def roll(model, prompts, params):
    return RolloutEngine(model, max_sequences=4, fallback="error", check=False).generate(prompts, params)


@pytest.mark.parametrize("family", FAMILIES + HYBRIDS)
def test_family(family):
    """Log-probs as near to a plain forward's as rounding allows, and the choices of the model's own `generate`."""
    model = tiny_model(family, initializer_range=0.1)
    engine = RolloutEngine(model, max_sequences=3, fallback="error")
    assert engine.support.hybrid == (family in HYBRIDS)
    asked = prompts(5, 70, 13)
    flashpo.stats(reset=True)
    rollouts = engine.generate(asked, SamplingParams(n=2, max_new_tokens=12))
    assert ("recurrence_step_" in flashpo.stats()) == (family in HYBRIDS and family not in THEIR_OWN_STEP)
    sequences = list(zip(rollouts.prompt_ids, rollouts.completion_ids))
    found = parity.judged(model, torch.tensor(rollouts.logprobs), [p + c for p, c in sequences])
    assert found.noise < 1e-4, "with more rounding than that nothing can be said"
    assert found.distance <= found.allowed
    chosen = engine.generate(asked, SamplingParams(temperature=0, max_new_tokens=12)).completion_ids
    assert chosen == [greedy(model, prompt, 12) for prompt in asked]


def warmed_up(runner, step):
    """In the place of a capture: what it does to the step."""
    for _ in range(3):
        step()
    return step, step


@pytest.mark.parametrize("family", HYBRIDS)
def test_states_keep_their_place(family, monkeypatch):
    """The GPU's bookkeeping on a CPU: a step of each size is used again, larger than its rows, for five tokens each."""
    model = tiny_model(family)
    asked = prompts(70, 5, 13)
    params = [SamplingParams(n=2, max_new_tokens=n, seed=n) for n in (9, 14, 22)]
    whole = RolloutEngine(model, fallback="error").generate(asked, params)
    monkeypatch.setattr(engine.Runner, "_capture", warmed_up)
    kept = RolloutEngine(model, fallback="error", max_sequences=3)
    kept.generate(asked[:1], params[0])
    kept.pool.runner.cuda, kept.pool.runner.check_every = True, 5
    for _ in range(2):
        rollouts = kept.generate(asked, params)
        assert_same_draws(model, rollouts, whole, params)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
def test_states_follow_their_rows(family, monkeypatch):
    """Rows of other lengths come and go, one is preempted, a session goes on behind a prompt."""
    model = tiny_model(family)
    asked = prompts(70, 5)
    params = [SamplingParams(n=3, max_new_tokens=n, seed=n) for n in (9, 14)]
    whole = RolloutEngine(model, fallback="error").generate(asked, params)
    few = RolloutEngine(model, max_sequences=2, fallback="error").generate(asked, params)
    assert_same_draws(model, few, whole, params)
    step, calls = CausalLM.logits, []

    def short_of_memory(self, hidden):
        calls.append(hidden)
        if len(calls) == 7:
            raise torch.OutOfMemoryError("no memory")
        return step(self, hidden)

    monkeypatch.setattr(CausalLM, "logits", short_of_memory)
    preempted = RolloutEngine(model, fallback="error").generate(asked, params)
    assert preempted.stats.preemptions
    assert_same_draws(model, preempted, whole, params)


def test_a_hybrids_turns():
    model = tiny_model("qwen3_next")
    first, more = prompts(70, 9)
    engine = RolloutEngine(model, fallback="error")
    greedily = SamplingParams(temperature=0, max_new_tokens=6)
    with engine.session():
        answer = engine.generate([first], greedily).completion_ids[0]
        second = engine.generate([first + answer + more], greedily)
    assert second.stats.prefill_tokens == len(answer) + len(more)  # the answer's own states are not kept
    assert second.completion_ids[0] == greedy(model, first + answer + more, 6)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", "does not use transformers' attention interface"),
        ("bert", "is not causal"),
        ("doge", "attention a mask of its own"),
        ("bart", "takes no position_ids"),
        ("mamba", "takes no position_ids"),
        ("diffllama", "more than once"),
        ("deepseek_v4", "are not supported: attention must see all earlier tokens or a window"),
        ("llama4_text", "layers of type chunked_attention"),
    ],
)
def test_refused_before_anything_runs(family, reason):
    answer = support(tiny_model(family))
    assert not answer.ok
    assert reason in answer.reason
    with pytest.raises(seam.Unsupported, match=re.escape(answer.reason)):
        RolloutEngine(tiny_model(family), fallback="error")


@pytest.mark.parametrize("family", ["modernbert-decoder", "jamba", "minimax", "recurrent_gemma"])
def test_refused_by_the_check(family, caplog):
    model = tiny_model(family)
    assert support(model).ok, "the premise: nothing else finds it"
    with pytest.raises(seam.Unsupported, match="answers otherwise"):
        RolloutEngine(model, fallback="error").generate(prompts(3), SamplingParams())
    rollouts = RolloutEngine(model).generate(prompts(3), SamplingParams(temperature=0, max_new_tokens=4))
    assert "answers otherwise" in caplog.text
    assert rollouts.completion_ids[0] == greedy(model, prompts(3)[0], 4)


def test_prompt_learning_is_refused():
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert "PREFIX_TUNING acts outside" in support(peft.get_peft_model(tiny_model("llama"), config)).reason


def test_rope_that_depends_on_the_batch():
    rope = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4, original_max_position_embeddings=64)
    model = tiny_model("llama", rope_parameters=rope)
    assert support(model).longest == 64
    with pytest.raises(ValueError, match="64 positions"):
        RolloutEngine(model, fallback="error").generate(prompts(60), SamplingParams(max_new_tokens=5))


CONTROLS = [
    ("mistral", "window", 1), ("mistral", "window", -1), ("gemma3_text", "window", 1), ("phimoe", "window", 1),
    ("gpt_oss", "sinks", None), ("gemma2", "softcap", None), ("gemma2", "scale", 1.01), ("qwen3", "scale", 1.01),
    ("qwen3_next", "scale", 1.01), ("gemma2", "final softcap", None), ("llama", "position", 1),
    ("qwen2", "position", 1), ("gemma4_text", "scale", 1.01),
]  # fmt: skip


COARSE = ("window", "sinks", "position")  # more than rounding in 16 bits, too


def spoil(monkeypatch, what, change):
    """Attention with another window, scale or position of decoded tokens, without sinks or without soft caps."""
    original = seam._attention

    def attention(module, query, key, value, mask, softcap=None, s_aux=None, **keywords):
        softcap = None if what == "softcap" else softcap
        s_aux = None if what == "sinks" else s_aux
        return original(module, query, key, value, mask, softcap=softcap, s_aux=s_aux, **keywords)

    def scaled(attend):
        return lambda self, layer, query, scale, *rest: attend(self, layer, query, scale * change, *rest)

    def shifted(model):
        answer = support(model)
        layers = [dataclasses.replace(x, window=x.window + change if x.window else 0) for x in answer.layers]
        return dataclasses.replace(answer, layers=tuple(layers))

    if what == "window":
        monkeypatch.setattr(engine, "support", shifted)
    elif what == "final softcap":
        logits = CausalLM.logits
        monkeypatch.setattr(CausalLM, "logits", lambda self, hidden: logits(self._replace(softcap=None), hidden))
    elif what == "position":
        monkeypatch.setattr(Step, "_hidden", shifted_position(Step._hidden, change))
    elif what == "scale":
        for attention in (Packed, Step):  # with and without the modules' Python
            monkeypatch.setattr(attention, "attend_cached", scaled(attention.attend_cached))
    else:
        monkeypatch.setitem(AttentionInterface._global_mapping, seam.ATTENTION, attention)


def where(what):
    """The check can name a layer if a prefill is wrong, too."""
    return "every layer agrees in a prefill" if what in ("position", "final softcap") else "is the first to differ"


def shifted_position(hidden, change):
    """Of decoded tokens only: keys and queries of prompts and completions that all move alike answer the same."""

    def shifted(self):
        self.position += change
        out = hidden(self)
        self.position -= change
        return out

    return shifted


@pytest.mark.parametrize(("family", "what", "change"), CONTROLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_finds(family, what, change, dtype, monkeypatch):
    """In a bf16 model, too: its small twin is in fp32."""
    model = tiny_model(family).to(dtype)
    assert not parity.why_wrong(model, roll)
    spoil(monkeypatch, what, change)
    reason = parity.why_wrong(model, roll)
    assert reason.startswith("a small ")
    assert where(what) in reason


@pytest.mark.parametrize(("family", "what", "change"), [c for c in CONTROLS if c[1] in COARSE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_check_finds_it_in_16_bits(family, what, change, dtype, monkeypatch):
    """In the model itself, where no twin can be made."""
    model = tiny_model(family).to(dtype)
    monkeypatch.setattr(parity, "_twin", lambda base: None)
    spoil(monkeypatch, what, change)
    assert where(what) in parity.why_wrong(model, roll)


@pytest.mark.parametrize("family", FAMILIES + HYBRIDS)
def test_rounding_in_16_bits_is_no_mistake(family, monkeypatch):
    """With experts that are chosen otherwise for some tokens, too."""
    monkeypatch.setattr(parity, "_twin", lambda base: None)
    for dtype in (torch.bfloat16, torch.float16):
        assert not parity.why_wrong(tiny_model(family).to(dtype), roll)


def test_the_model_itself_is_checked(monkeypatch):
    """What only its size shows: here, a twin cannot be made."""
    model = tiny_model("qwen3").to(torch.bfloat16)
    monkeypatch.setattr(parity, "_twin", lambda base: None)
    assert not parity.why_wrong(model, roll)
    logits = CausalLM.logits
    monkeypatch.setattr(CausalLM, "logits", lambda self, hidden: logits(self, hidden) * 0.7)
    assert "every layer agrees in a prefill" in parity.why_wrong(model, roll)


def test_nothing_is_said_of_a_broken_model():
    model = tiny_model("qwen3")
    model.lm_head.weight.data[5] = torch.nan
    assert not parity._difference(model, roll, None)


def test_asked_once(monkeypatch):
    monkeypatch.setattr(parity, "_answers", {})
    asked = []
    monkeypatch.setattr(parity, "why_wrong", lambda model, roll, autocast: asked.append(model) or "")
    for family in ("qwen3", "qwen3", "llama"):
        rollouts = RolloutEngine(tiny_model(family)).generate(prompts(3), SamplingParams(max_new_tokens=2))
        assert len(rollouts.completion_ids[0]) == 2
    assert len(asked) == 2


def test_asked_again_of_other_dtypes(monkeypatch):
    """A model whose layers differ in dtype may be wrong where one that is bf16 throughout is right."""
    monkeypatch.setattr(parity, "_answers", {})
    monkeypatch.setattr(parity, "_twice", lambda model, roll, autocast: "wrong" if mixed(model) else "")
    half, both = (tiny_model("qwen3").to(torch.bfloat16) for _ in range(2))
    both.model.layers[1].float()
    assert "wrong" in parity.check(both, roll, None)
    assert not parity.check(half, roll, None)


def mixed(model):
    return len({p.dtype for p in model.parameters()}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", ["gemma4_text", "qwen3_next"])
def test_the_check_over_seeds(family, seed, dtype, monkeypatch):
    """Right models lie far below what is allowed, wrong ones far above, whatever the weights."""
    manual_seed = torch.manual_seed
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda _: manual_seed(seed))
        model = tiny_model(family).to(dtype)
    asked = prompts(70, 5, 13)
    rollouts = roll(model, asked, SamplingParams(n=2, max_new_tokens=12))
    sequences = [p + c for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids)]
    right = parity.judged(model, torch.tensor(rollouts.logprobs), sequences)
    assert right.distance < 0.6 * right.allowed
    scaled = copy.deepcopy(model)
    scaled.lm_head.weight.data *= 1.01 if dtype == torch.float32 else 1.5
    wrong = parity.judged(scaled, torch.tensor(rollouts.logprobs), sequences)
    assert wrong.distance > 3 * wrong.allowed


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gpt2", "gemma2", "falcon", "olmo2"])
def test_small_configs_have_heads_that_fit(family, heads):
    """As many key heads as query heads, fewer, or one, whatever the number."""
    config = CONFIG_MAPPING[family](vocab_size=97)
    for kv_heads in {heads, max(heads // 2, 1), 1}:
        config.num_attention_heads = heads
        for name in {"num_key_value_heads", "num_kv_heads"} & set(config.to_dict()):
            setattr(config, name, kv_heads)
        model = small_model(small_config(config))
        assert model(torch.arange(2, 12)[None]).logits.isfinite().all()
        small = model.config
        assert small.num_attention_heads <= 4
        small_kv = getattr(small, "num_key_value_heads", small.num_attention_heads)
        assert small.num_attention_heads % small_kv == 0
        if "num_key_value_heads" in config.to_dict():
            assert (small_kv == small.num_attention_heads) == (kv_heads == heads)


@pytest.mark.parametrize("family", FAMILIES + HYBRIDS)
def test_no_name_of_transformers_that_goes(family):
    """A rollout and its self-check say nothing of deprecated arguments."""
    model = tiny_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        rollouts = roll(model, prompts(5), SamplingParams(max_new_tokens=3))
        sequences = [p + c for p, c in zip(rollouts.prompt_ids, rollouts.completion_ids)]
        parity.judged(model, torch.tensor(rollouts.logprobs), sequences)


def test_small_configs_keep_what_makes_the_family():
    config = tiny_config("gemma2")
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert tiny_config("qwen3_next").layer_types == ["linear_attention", "full_attention"] * 2
    assert tiny_config("gpt_oss").sliding_window == 9
