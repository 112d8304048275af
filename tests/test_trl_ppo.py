"""A step of PPOTrainer equals one written in plain torch; critics, KL, LoRA, accumulation, epochs."""

import pytest
import torch

pytest.importorskip("trl")
import trl
from peft import LoraConfig
from test_gae import in_torch
from transformers import AutoModelForCausalLM
from trl_models import DATA, assert_ran, assert_same, make_trainer, model_path, reward, train, weights

import flashpo.trl
from flashpo.trl import PPOConfig, PPOTrainer
from flashpo.trl.verify import Step

LORA = dict(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def make(**options):
    options = dict(num_generations=1, per_device_train_batch_size=8) | options
    trainer = make_trainer("PPO", flashpo.trl, **options)
    torch.nn.init.normal_(trainer.critic.head.weight, std=0.2)  # a head of zeros has no gradient for its backbone
    return trainer


def first_batch(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # `train` sets it
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def by_hand(trainer, batch, model=None):
    """(log-probs, entropies, values) of the completions in plain torch, from logits and hidden states."""
    policy = trainer.accelerator.unwrap_model(trainer.model if model is None else model)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    T = batch["completion_ids"].shape[1]
    out = policy(input_ids=ids, attention_mask=attention, output_hidden_states=True)
    logp = (out.logits[:, -T - 1 : -1] / trainer.temperature).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    logprob = logp.gather(-1, batch["completion_ids"][..., None])[..., 0]
    hidden = out.hidden_states[-1]
    if trainer.critic.backbone is not None:
        hidden = trainer.critic.backbone(input_ids=ids, attention_mask=attention).last_hidden_state
    values = hidden[:, -T - 1 : -1] @ trainer.critic.head.weight[0] + trainer.critic.head.bias
    return logprob, entropy, values


def reference_logprob(trainer, batch):
    if hasattr(trainer.model, "disable_adapter"):
        with trainer.model.disable_adapter():
            return by_hand(trainer, batch)[0]
    return by_hand(trainer, batch, AutoModelForCausalLM.from_pretrained(model_path("qwen3")))[0]


def step_by_hand(trainer, batch, old, mask):
    """Loss of one PPO step as the papers write it, from the tokens alone and what the old policy gave (`old`)."""
    args = trainer.args
    old_logprob, _, old_values, ref = old
    ids = [row[live.bool()].tolist() for row, live in zip(batch["completion_ids"], batch["completion_mask"])]
    scores = reward(None, ids)
    rewards = torch.zeros(mask.shape)
    for row, live, score in zip(rewards, mask, scores):
        if live.any():
            row[live.nonzero()[-1, 0]] = score
    if args.beta and args.kl_in == "reward":
        rewards = rewards - args.beta * (old_logprob - ref)
    advantages, returns = in_torch(rewards, old_values, mask, args.gamma, args.lam)
    if args.whiten_advantages:
        advantages = in_torch(rewards, old_values, mask, args.gamma, args.lam, whiten=True)[0]

    logprob, entropy, values = by_hand(trainer, batch)
    ratio = torch.exp(logprob - old_logprob)
    upper = args.epsilon if args.epsilon_high is None else args.epsilon_high
    unclipped = ratio if args.delta is None else ratio.clamp(max=args.delta)
    loss = -torch.min(unclipped * advantages, ratio.clamp(1 - args.epsilon, 1 + upper) * advantages)
    if args.beta and args.kl_in == "loss":
        kl = torch.exp(ref - logprob) - (ref - logprob) - 1
        loss = loss + args.beta * (ratio * kl if args.use_bias_correction_kl else kl)
    loss = loss - args.entropy_coef * entropy
    errors = (values - returns) ** 2
    if args.cliprange_value is not None:
        near = torch.clamp(values, old_values - args.cliprange_value, old_values + args.cliprange_value)
        errors = torch.max(errors, (near - returns) ** 2)
    return ((loss + args.vf_coef * 0.5 * errors) * mask).sum() / mask.sum()


def move(trainer) -> None:
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p += 0.1 * (p.std() if p.numel() > 1 else 0.1) * torch.randn_like(p)


def gradients_of(trainer, loss) -> dict:
    trainer.model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"critic": "separate"},
        {"kl_in": "loss"},
        {"kl_in": "loss", "use_bias_correction_kl": False, "critic": "separate"},
        {"beta": 0.0, "num_generations": 4, "gamma": 0.97, "lam": 0.8, "vf_coef": 1.0},
        {"whiten_advantages": False, "cliprange_value": None, "epsilon_high": 0.3, "delta": 1.5},
        {"entropy_coef": 0.02, "tools": True},
        {"kl_in": "loss", "tools": True, "cliprange_value": 0.05},
        {"lora": True},
        {"lora": True, "critic": "separate", "kl_in": "loss"},
    ],
    ids=str,
)
def test_a_step_by_hand(options, monkeypatch):
    """The loss and every gradient, after the policy has moved away from the one that generated."""
    options = dict(options)
    if options.pop("tools", False):
        stock = trl.GRPOTrainer._generate_and_score_completions

        def with_tools(self, inputs):
            batch = stock(self, inputs)
            return batch | {"tool_mask": (torch.rand(batch["completion_mask"].shape) > 0.3).long()}

        monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", with_tools)
    trainer = make(**(LORA if options.pop("lora", False) else {}), **options)
    move(trainer)  # away from the reference
    flashpo.stats(reset=True)
    batch = first_batch(trainer)
    mask = (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()
    assert (batch["mask"] == mask).all()
    with torch.no_grad():
        old = (*by_hand(trainer, batch), reference_logprob(trainer, batch) if trainer.beta else None)
    close = dict(rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(batch["old_per_token_logps"][mask], old[0][mask], **close)
    torch.testing.assert_close(batch["old_values"][mask], old[2][mask], **close)
    if trainer.beta:
        torch.testing.assert_close(batch["ref_per_token_logps"][mask], old[3][mask], **close)

    move(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    ours = Step(loss.item(), {}, gradients_of(trainer, loss))
    assert_ran("linear_logprob_bwd", "gae_fwd", "policy_loss_fwd")
    loss = step_by_hand(trainer, batch, old, mask)
    expected = Step(loss.item(), {}, gradients_of(trainer, loss))
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert set(ours.gradients) == trained
    assert all(g.abs().max() > 0 for g in ours.gradients.values())
    assert_same([expected], [ours])
    trainer.flush_metrics()
    clipped = trainer._metrics["train"]
    assert 0 < clipped["clip_ratio/region_mean"][-1] < 1
    if trainer.args.cliprange_value is not None:
        assert 0 < clipped["value_clip_fraction"][-1] < 1


def test_the_critic_can_be_a_model_of_any_kind():
    """A model's backbone, here of another width; its own parameters, trained."""
    from transformers import AutoModelForCausalLM, GemmaConfig
    from trl_models import SMALL

    other = AutoModelForCausalLM.from_config(GemmaConfig(**{**SMALL, "hidden_size": 48}, head_dim=16))
    trainer = make(critic_model=other, max_steps=2)
    before = other.base_model.layers[0].mlp.up_proj.weight.clone()
    steps = train(trainer)
    assert trainer.critic.backbone is other.base_model
    assert trainer.critic.head.in_features == 48
    assert "critic.backbone.layers.0.mlp.up_proj.weight" in steps[0].gradients
    assert not torch.equal(before, other.base_model.layers[0].mlp.up_proj.weight)


def test_unscorable_completions_train_nothing():
    def sometimes(completion_ids, **kwargs):
        return [None if i % 2 else float(len(ids)) for i, ids in enumerate(completion_ids)]

    trainer = make(reward_funcs=sometimes, num_iterations=1)
    batch = trainer._generate_and_score_completions([{"prompt": row["prompt"]} for row in DATA["PPO"][:8]])
    assert not batch["mask"][1::2].any()
    assert batch["mask"][::2].any(1).all()
    assert batch["num_items_in_batch"] == batch["mask"].sum()
    assert (batch["advantages"][1::2] == 0).all()


def test_an_infinite_reward_raises():
    trainer = make()
    trainer.reward_funcs = [lambda completions, **kwargs: [float("inf")] * len(completions)]
    with pytest.raises(ValueError, match="infinite"):
        trainer.train()


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_batch_without_live_tokens(options):
    def nothing(completion_ids, **kwargs):
        return [None] * len(completion_ids)

    (step,) = train(make(reward_funcs=nothing, **options))
    assert step.loss == 0
    assert all((g == 0).all() for g in step.gradients.values())


def steps_of_one_batch(**options):
    trainer = make(num_iterations=1, max_grad_norm=0.0, **options)  # not clipped: gradients as they are
    generator = torch.Generator().manual_seed(3)  # the head, made after the trainer has drawn its seeds
    trainer.critic.head.weight.data = torch.randn(trainer.critic.head.weight.shape, generator=generator) * 0.2
    torch.manual_seed(7)
    return train(trainer)


@pytest.mark.parametrize("options", [{}, {"kl_in": "loss", "entropy_coef": 0.01}], ids=str)
def test_accumulated_gradients_are_those_of_one_batch(options):
    (whole,) = steps_of_one_batch(per_device_train_batch_size=8, **options)
    (parts,) = steps_of_one_batch(per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    same = [Step(0.0, {}, step.gradients) for step in (whole, parts)]
    assert_same(same[:1], same[1:])
    assert parts.loss == pytest.approx(whole.loss, rel=1e-4)
    assert parts.metrics["reward"] == whole.metrics["reward"]


def test_minibatches_are_divided_by_their_share_of_the_batch():
    """An optimizer step on each half of a batch, without moving: the mean of their gradients is the whole batch's."""
    (whole,) = steps_of_one_batch(per_device_train_batch_size=8, learning_rate=0.0)
    halves = steps_of_one_batch(per_device_train_batch_size=4, steps_per_generation=2, max_steps=2, learning_rate=0.0)
    mean = {n: (g + halves[1].gradients[n]) / 2 for n, g in halves[0].gradients.items()}
    assert_same([Step(0.0, {}, whole.gradients)], [Step(0.0, {}, mean)])


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_gradient_checkpointing(critic):
    (plain,) = steps_of_one_batch(critic=critic)
    (saved,) = steps_of_one_batch(critic=critic, gradient_checkpointing=True)
    assert_same([Step(plain.loss, {}, plain.gradients)], [Step(saved.loss, {}, saved.gradients)])


def test_epochs_over_minibatches():
    """2 epochs x 2 minibatches: advantages once a generation, ratios of 1 in the first step of each alone."""
    trainer = make(per_device_train_batch_size=4, steps_per_generation=2, num_iterations=2, max_steps=8)
    flashpo.stats(reset=True)
    steps = train(trainer)
    assert sum(flashpo.stats()["gae_fwd"].values()) == 2
    assert len(steps) == 8
    for i, step in enumerate(steps):
        assert ("reward" in step.metrics) == (i % 4 == 0)
        if i % 4 == 0:
            assert step.metrics["approx_kl"] == pytest.approx(0, abs=1e-5)
            assert step.metrics["value_clip_fraction"] == 0
        else:
            assert abs(step.metrics["approx_kl"]) > 1e-4


def test_metrics():
    (step,) = train(make())
    names = ("value_loss", "value_clip_fraction", "explained_variance", "returns/mean", "values/mean", "kl", "entropy")
    assert all(name in step.metrics for name in (*names, "policy_loss", "approx_kl", "reward", "clip_ratio/low_mean"))
    trainer = make(whiten_advantages=False, beta=0.0, lam=1.0)
    batch = first_batch(trainer)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    returns, error = (x[batch["mask"]] for x in (batch["returns"], batch["returns"] - batch["old_values"]))
    assert logged["explained_variance"] == pytest.approx(
        (1 - error.var(correction=0) / returns.var(correction=0)).item(), rel=1e-4
    )
    assert logged["returns/mean"] == pytest.approx(returns.mean().item(), rel=1e-5)
    assert logged["reward"] == pytest.approx(logged["returns/mean"], abs=1.0)  # lam = gamma = 1: returns are rewards


def test_verify():
    """There is no PPO in TRL to compare with: TRL's scoring of tokens in the place of ours."""
    trainer = make(num_iterations=2)
    report = flashpo.trl.verify(trainer, steps=2)
    assert any(line.name == "grad critic.head.weight" and line.stock > 0 for line in report.lines)
    assert trainer._pending.sums == {"train": [], "eval": []}


def test_evaluation():
    from datasets import Dataset

    trainer = make(eval_dataset=Dataset.from_list(DATA["PPO"][:4]), per_device_eval_batch_size=2)
    before = weights(trainer.model)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_reward", "eval_value_loss", "eval_explained_variance", "eval_kl"} <= metrics.keys()
    assert all(torch.equal(p, before[n]) for n, p in weights(trainer.model).items())


def scripted(trainer, *methods):
    """Completions that depend on nothing but their prompt, whichever process they are on."""

    def generate(prompt_ids, *args, **kwargs):
        completions = []
        for ids in prompt_ids:
            generator = torch.Generator().manual_seed(sum(i * t for i, t in enumerate(ids, 1)))
            length = int(torch.randint(2, 9, (), generator=generator))
            completions.append(torch.randint(5, 90, (length,), generator=generator).tolist())
        return completions, None

    trainer._generate_single_turn = generate
    generator = torch.Generator().manual_seed(3)
    trainer.critic.head.weight.data = torch.randn(trainer.critic.head.weight.shape, generator=generator) * 0.2
    return trainer


def test_it_learns():
    """A completion is paid the share of its tokens that are letters: 26 of 97 by chance."""

    def letters(completion_ids, **kwargs):
        return [sum(5 <= t < 31 for t in ids) / max(len(ids), 1) for ids in completion_ids]

    trainer = make(
        reward_funcs=letters, per_device_train_batch_size=16, max_steps=60, learning_rate=5e-3, num_iterations=2,
        lr_scheduler_type="constant", beta=0.0, vf_coef=0.5,
    )  # fmt: skip
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert last > first + 0.3, rewards


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss_type", "grpo"),
        ("importance_sampling_level", "sequence"),
        ("scale_rewards", "batch"),
        ("multi_objective_aggregation", "normalize_then_sum"),
        ("top_entropy_quantile", 0.2),
        ("off_policy_mask_threshold", 0.5),
        ("use_adaptive_entropy", True),
        ("sync_ref_model", True),
        ("use_vllm", True),
        ("sapo_temperature_pos", 2.0),
        ("vespo_k_neg", 4.0),
        ("kl_in", "both"),
        ("gamma", 1.5),
        ("lam", -0.1),
        ("vf_coef", 0.0),
        ("cliprange_value", 0.0),
        ("num_generations", 0),
        ("critic", ""),
        ("generation_batch_size", 7),  # GRPOConfig's own checks still run
    ],
)
def test_bad_config(name, value, tmp_path):
    with pytest.raises(ValueError, match=name):
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: value})


def test_bad_trainer_arguments(tmp_path):
    config = PPOConfig(str(tmp_path), use_cpu=True, bf16=False, critic="separate")
    assert type(config.num_generations) is int
    path = model_path("qwen3")
    model = AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(TypeError, match="args must be a PPOConfig, got GRPOConfig"):
        PPOTrainer(path, reward, trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))
    with pytest.raises(ValueError, match=r"critic_model and PPOConfig.critic='separate' exclude each other"):
        PPOTrainer(path, reward, config, critic_model=model)
    with pytest.raises(ValueError, match="optimizers"):
        PPOTrainer(path, reward, config, optimizers=(torch.optim.SGD(model.parameters()), None))
