"""Rollouts of prompts with images: the tower computes each image once, and equal images share a cached prefix."""

import pytest
import torch

from flashpo.bench.tiny_images import TOKEN, image_model, pictures, type_ids
from flashpo.bench.tiny_models import tiny_multimodal
from flashpo.rollout import RolloutEngine, SamplingParams, parity
from flashpo.rollout.images import Shown, of_prompts

WORDS = torch.randint(2, 90, (200,), generator=torch.Generator().manual_seed(0)).tolist()
SHOWN = [[0], [1], [0], [], [0, 2]]  # the images of each prompt, by their seeds
PARAMS = SamplingParams(n=2, max_new_tokens=6, seed=3)


@pytest.fixture(autouse=True)
def asked_anew():
    parity._answers.clear()


def shown_prompts(model, shown=SHOWN, words: int = 70):
    """They begin with the same words, more than a block of the cache, and then show their images."""
    fields, tokens = pictures(model, shown)
    prompts = []
    for i, own in enumerate(shown):
        prompt = WORDS[:words]
        for _ in own:
            prompt = prompt + [TOKEN] * tokens + WORDS[70:75]
        prompts.append(prompt + WORDS[75 : 80 + i])
    counts = {"num_images": [len(own) for own in shown]} if "pixel_attention_mask" not in fields else {}
    return prompts, fields | counts


def plain_logprobs(model, rollouts, shown=SHOWN):
    """Of each completion, by one forward of its sequence."""
    found = []
    for prompt, completion, row in zip(rollouts.prompt_ids, rollouts.completion_ids, rollouts.prompt_index):
        ids = torch.tensor([prompt + completion])
        fields = pictures(model, [shown[row]])[0] | type_ids(model, ids) if shown[row] else {}
        logits = model(input_ids=ids, use_cache=False, **fields).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.double().log_softmax(-1)
        found.append(logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.stack(found)


def assert_plain(model, rollouts, shown=SHOWN):
    with torch.no_grad():
        expected = plain_logprobs(model, rollouts, shown)
    torch.testing.assert_close(torch.tensor(rollouts.logprobs).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5", "smolvlm", "llava_next"])
def test_log_probs_are_those_of_a_plain_forward(family):
    model = image_model(family)
    prompts, fields = shown_prompts(model)
    rollouts = RolloutEngine(model, fallback="error", check=False).generate(prompts, PARAMS, images=fields)
    assert_plain(model, rollouts)
    if family != "qwen3_5":  # hybrids share whole prompts only
        assert rollouts.stats.prefill_tokens <= sum(map(len, prompts)) - 4 * 64


def towers_images(model, run) -> int:
    """How many images the tower of a Qwen model has seen."""
    seen = []
    hook = model.model.visual.register_forward_pre_hook(lambda m, args: seen.append(len(args[0]) // 16))
    run()
    hook.remove()
    return sum(seen)


def test_each_image_passes_the_tower_once():
    model = image_model("qwen3_vl")
    prompts, fields = shown_prompts(model)
    engine = RolloutEngine(model, fallback="error", check=False)
    assert towers_images(model, lambda: engine.generate(prompts, PARAMS, images=fields)) == 3


def test_turns_of_a_session_bring_images():
    """The second turn goes on behind the first one's completion, with an image more and one seen before."""
    model = image_model("qwen2_5_vl")
    first, fields = shown_prompts(model, [[0]])
    engine = RolloutEngine(model, fallback="error", check=False)
    with engine.session():
        answer = engine.generate(first, SamplingParams(max_new_tokens=5), images=fields).completion_ids[0]
        image = [TOKEN] * 4
        second = [first[0] + answer + WORDS[:3] + image + WORDS[3:6] + image + WORDS[6:9]]
        fields = pictures(model, [[0, 1, 0]])[0]
        turns = []
        seen = towers_images(model, lambda: turns.append(engine.generate(second, PARAMS, images=fields)))
        third = [second[0] + turns[0].completion_ids[0] + WORDS[9:12]]
        turns.append(engine.generate(third, PARAMS, images=fields))
    assert seen == 1
    assert turns[0].stats.prefill_tokens < len(second[0]) - 64
    assert turns[1].stats.prefill_tokens < 64
    for rollouts in turns:
        assert_plain(model, rollouts, [[0, 1, 0]])


def test_rows_that_start_again_stand_where_they_stood():
    model = image_model("qwen3_vl")
    prompts, fields = shown_prompts(model)
    whole = RolloutEngine(model, fallback="error", check=False).generate(prompts, PARAMS, images=fields)
    tight = RolloutEngine(model, fallback="error", check=False, expected_tokens=1, max_sequences=3, prefill_tokens=7)
    rollouts = tight.generate(prompts, PARAMS, images=fields)
    assert rollouts.completion_ids == whole.completion_ids
    assert_plain(model, rollouts)


def test_placeholders_are_never_drawn():
    model = image_model("qwen2_5_vl")
    prompts, fields = shown_prompts(model)
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor(prompts[:1]), use_cache=False, output_hidden_states=True).hidden_states
        model.lm_head.weight[[TOKEN, TOKEN - 1]] = 100 * hidden[-1][0, -1]
    rollouts = RolloutEngine(model, fallback="error", check=False).generate(prompts, PARAMS, images=fields)
    assert not {TOKEN, TOKEN - 1} & {token for row in rollouts.completion_ids for token in row}


def test_generate_answers_in_its_place_with_the_images(monkeypatch):
    model = image_model("qwen3_vl")
    prompts, fields = shown_prompts(model)
    monkeypatch.setattr(RolloutEngine, "why_not_images", lambda *args: "no reason")
    engine = RolloutEngine(model)
    rollouts = engine.generate(prompts, PARAMS, images=fields)
    assert rollouts.stats.steps == 0
    assert_plain(model, rollouts)


WRONG = {
    "an image less": (lambda p, f: (p[:1] + p[:1], f), "num_images must be 2 numbers"),
    "tokens of no image": (lambda p, f: ([[TOKEN, *p[0]], *p[1:]], f), "row 0 has 5 image tokens, its 1 images have 4"),
    "types of other tokens": (
        lambda p, f: (p, f | {"mm_token_type_ids": [[1] * len(x) for x in p]}),
        "mm_token_type_ids: row 0 marks other tokens",
    ),
    "sounds": (lambda p, f: (p, f | {"input_features": torch.ones(1)}), "input_features is not known"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(what):
    model = image_model("qwen3_vl")
    change, message = WRONG[what]
    prompts, fields = change(*shown_prompts(model))
    with pytest.raises(ValueError, match=message):
        RolloutEngine(model, check=False).generate(prompts, PARAMS, images=fields)


def positions_of_text(monkeypatch):
    monkeypatch.setattr(Shown, "turns", lambda *args: None)


def positions_lost_in_decoding(monkeypatch):
    monkeypatch.setattr(Shown, "ahead", lambda *args: 0)


def images_shared_by_mistake(monkeypatch):
    right = Shown.told_apart

    def wrong(self, prompts, images):
        coded = right(self, prompts, images)
        return [*coded[:-1], coded[0]]

    monkeypatch.setattr(Shown, "told_apart", wrong)


def features_of_a_neighbour(monkeypatch):
    right = Shown._embed

    def wrong(self, space, some):
        right(self, space, some)
        for i in some:
            self._features[space, i] = [x.roll(1, 0) for x in self._features[space, i]]

    monkeypatch.setattr(Shown, "_embed", wrong)


@pytest.mark.parametrize(
    "fault", [positions_of_text, positions_lost_in_decoding, images_shared_by_mistake, features_of_a_neighbour]
)
def test_a_wrong_engine_is_found(fault, monkeypatch):
    model = image_model("qwen3_vl")
    prompts, fields = shown_prompts(model)
    engine = RolloutEngine(model, fallback="error")
    images = of_prompts(model, prompts, fields)
    fault(monkeypatch)
    assert "log-probs after an image differ" in engine.why_not_images(prompts, images)


def test_a_right_engine_passes():
    model = image_model("qwen3_vl")
    prompts, fields = shown_prompts(model)
    assert RolloutEngine(model).why_not_images(prompts, of_prompts(model, prompts, fields)) is None


def test_prompts_may_be_longer_than_a_small_twin_reads_by_default():
    """As prompts with large images are."""
    model = image_model("qwen3_vl")
    model.config.text_config.max_position_embeddings = 4096
    prompts, fields = shown_prompts(model, [[0]])
    prompts = [WORDS * 3 + prompts[0]]
    assert RolloutEngine(model).why_not_images(prompts, of_prompts(model, prompts, fields)) is None


def test_gemma_is_refused_by_its_reason():
    model = tiny_multimodal("gemma3")
    engine = RolloutEngine(model, fallback="error", check=False)
    assert engine.why_not_images([[1]], object()) == "tokens of an image see each other in both directions"
