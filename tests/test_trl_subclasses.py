"""Subclasses that override TRL's methods: their methods run with TRL's arguments, and their results are used."""

import contextlib
import inspect
from types import SimpleNamespace

import pytest
import torch
import trl
from trl_models import assert_same, make_trainer, train

import flashpo
import flashpo.trl

RL = (
    "_prepare_inputs", "_generate_and_score_completions", "_generate", "_generate_single_turn", "_calculate_rewards",
    "_get_per_token_logps_and_entropies", "compute_loss", "_compute_loss", "training_step", "log",
)  # fmt: skip
LABELLED = ("_prepare_dataset", "compute_loss", "training_step", "log")
PAIRS = (*LABELLED, "_compute_loss", "compute_ref_log_probs")
METHODS = {"GRPO": RL, "RLOO": RL, "SFT": LABELLED, "DPO": PAIRS, "KTO": PAIRS}
OPTIONS = {
    "GRPO": dict(beta=0.1, num_iterations=2, max_steps=2),
    "RLOO": dict(beta=0.1),
    "DPO": dict(precompute_ref_log_probs=True),
    "KTO": dict(precompute_ref_log_probs=True),
}
CHANGES = {  # what a subclass makes of TRL's result
    "compute_loss": lambda loss: 3 * loss,
    "_compute_loss": lambda loss: 2 * loss,
    "_calculate_rewards": lambda rewards: rewards.square(),
    "_get_per_token_logps_and_entropies": lambda scores: (0.9 * scores[0], *scores[1:]),
    "compute_ref_log_probs": lambda scores: tuple(0.9 * x for x in scores),
}


def overriding(base: type, stock: type, names, calls: list) -> type:
    """A subclass of `base` that overrides methods with the signatures that they have in `stock`, notes how they are
    called, and changes what they return."""

    def method(name):
        signature = inspect.signature(getattr(stock, name))

        def call(self, *args, **kwargs):
            signature.bind(self, *args, **kwargs)  # as Python binds them: a TypeError for what TRL does not have
            calls.append((name, len(args), sorted(kwargs)))
            result = getattr(super(subclass, self), name)(*args, **kwargs)
            return CHANGES[name](result) if name in CHANGES and result is not None else result

        return call

    subclass = type(f"Users{stock.__name__}", (base,), {name: method(name) for name in names})
    return subclass


def trained(name, package, names, **options):
    calls: list = []
    stock = getattr(trl, f"{name}Trainer")
    subclass = overriding(getattr(package, f"{name}Trainer"), stock, names, calls)
    users = SimpleNamespace(**{f"{name}Trainer": subclass, f"{name}Config": getattr(package, f"{name}Config")})
    return train(make_trainer(name, users, **OPTIONS.get(name, {}), **options)), calls


def same_samples(name) -> dict:
    return {"rollout": "generate"} if name in ("GRPO", "RLOO") else {}


def assert_users_train_alike(name, methods: dict, warning: str = "", **options):
    """A subclass of TRL's trainer and one of ours with these methods; `warning`: what ours says meanwhile."""
    steps = []
    for package in (trl, flashpo.trl):
        subclass = type("Users", (getattr(package, f"{name}Trainer"),), methods)
        users = SimpleNamespace(**{f"{name}Trainer": subclass, f"{name}Config": getattr(package, f"{name}Config")})
        ours = package is flashpo.trl
        trainer = make_trainer(name, users, **options, **(same_samples(name) if ours else {}))
        with pytest.warns(UserWarning, match=warning) if ours and warning else contextlib.nullcontext():
            steps.append(train(trainer))
    assert_same(*steps)


@pytest.mark.parametrize("name", METHODS)
def test_every_override_is_called_as_by_trl(name):
    stock, of_trl = trained(name, trl, METHODS[name])
    flashpo.stats(reset=True)
    ours, calls = trained(name, flashpo.trl, METHODS[name], **same_samples(name))
    assert calls == of_trl
    assert {n for n, *_ in calls} == set(METHODS[name])
    assert_same(stock, ours)
    assert flashpo.stats()["tree_attention_bwd"], "what is not overridden stays fast"


def in_plain_torch(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False,
                   compute_aux_loss=False, pixel_values=None, image_grid_thw=None, num_images=None,
                   pixel_attention_mask=None, spatial_shapes=None, num_tiles=None, image_sizes=None,
                   token_type_ids=None, mm_token_type_ids=None, image_position_ids=None):  # fmt: skip
    """Scores tokens with nothing of TRL or FlashPO."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, -logits_to_keep - 1 : -1]
    logprobs = (logits / self.temperature).log_softmax(-1)
    picked = logprobs.gather(-1, input_ids[:, -logits_to_keep:, None]).squeeze(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1) if compute_entropy else None
    return picked, entropy, None


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_a_scoring_of_tokens_in_plain_torch(name):
    """The second prompt has equal rewards: theirs gets its rows, too, and in the same call as the others."""
    theirs = {"_get_per_token_logps_and_entropies": in_plain_torch}
    equal = dict(reward_funcs=lambda completions, **_: [float(min(i, 4)) for i in range(len(completions))])
    assert_users_train_alike(name, theirs, per_device_train_batch_size=8, **equal)


def test_a_batch_made_in_trls_way_trains_rloo():
    """TRL's batch has old log-probs of sequences, ours of tokens, too: a subclass that makes a batch knows TRL's."""

    def batch(self, inputs):
        made = super(type(self), self)._generate_and_score_completions(inputs)
        return {key: value for key, value in made.items() if key not in ("old_per_token_logps", "ref_per_token_logps")}

    theirs = {"_generate_and_score_completions": batch}
    assert_users_train_alike("RLOO", theirs, "leaves the loss to TRL: Users's batch has old log-probs of sequences")


def test_weights_that_trls_loss_does_not_read():
    """A ratio of importance in the batch is for vLLM's rollouts, and for vespo."""

    def batch(self, inputs):
        made = super(type(self), self)._generate_and_score_completions(inputs)
        return made | {"importance_sampling_ratio": torch.full_like(made["completion_mask"], 0.5, dtype=torch.float)}

    for loss in ("dapo", "vespo"):
        assert_users_train_alike("GRPO", {"_generate_and_score_completions": batch}, loss_type=loss)


HELPERS = {
    "get_high_entropy_mask": (dict(top_entropy_quantile=0.5), lambda self, entropies, mask, threshold: mask.bool()),
    "get_off_policy_mask": (
        dict(off_policy_mask_threshold=0.1),
        staticmethod(lambda mask, **rest: 0.5 * mask),
    ),
    "get_gamma_weights": (
        dict(loss_type="vespo"),
        staticmethod(lambda advantages, **rest: 0.5 * torch.ones_like(advantages)),
    ),
}


@pytest.mark.parametrize("helper", HELPERS)
def test_a_method_that_trls_loss_calls(helper):
    """Our loss has no use for it, so that TRL's own loss runs, after a warning that names it."""
    options, method = HELPERS[helper]
    theirs = {helper: method}
    warning = f"leaves the loss to TRL: Users has a {helper} of its own"
    assert_users_train_alike("GRPO", theirs, warning, **options)


def test_the_methods_that_trls_loss_calls_are_those_that_we_know():
    used = set(trl.GRPOTrainer._compute_loss.__code__.co_names) & set(vars(trl.GRPOTrainer))
    assert used == {*flashpo.trl.GRPOTrainer._loss_helpers, "_get_per_token_logps_and_entropies"}
    used = set(trl.RLOOTrainer._compute_loss.__code__.co_names) & set(vars(trl.RLOOTrainer))
    assert used == {*flashpo.trl.RLOOTrainer._loss_helpers, "_get_per_token_logps_and_entropies"}


def test_a_log_that_reads_the_metrics_first():
    """Ours wait on the device until they are logged; a subclass reads them before it calls the method below."""
    seen = []

    class Users(flashpo.trl.GRPOTrainer):
        def log(self, logs, start_time=None):
            seen.append(set(self._metrics["train"]))
            super().log(logs, start_time)

    train(make_trainer("GRPO", SimpleNamespace(GRPOTrainer=Users, GRPOConfig=flashpo.trl.GRPOConfig)))
    assert {"entropy", "clip_ratio/region_mean"} <= seen[0]
