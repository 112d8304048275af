"""PPOConfig: TRL's GRPOConfig with the options of actor and critic. Options of GRPO that PPO lacks raise an error."""

from dataclasses import dataclass, field, fields
from typing import Any

import trl

from flashpo.trl import options
from flashpo.trl.config import GRPO_LOSS_OPTIONS, CorrectionOptions, documented

# Options of GRPO's mathematics -> why PPO does not have them
REFUSED = {
    "loss_type": "the loss is PPO's clipped surrogate, a mean over tokens",
    "importance_sampling_level": "ratios are of tokens",
    "scale_rewards": "advantages come from GAE, not from groups; see whiten_advantages",
    "multi_objective_aggregation": "it normalises within groups; rewards are summed by reward_weights",
    "top_entropy_quantile": "every token has a loss",
    "off_policy_mask_threshold": "no sequence is dropped",
    "use_adaptive_entropy": "entropy_coef is constant",
    "sync_ref_model": "the reference model has no critic to be synchronised with",
    "use_vllm": "vLLM would be sent the critic's weights",
}
REFUSED |= {name: REFUSED["loss_type"] for name in GRPO_LOSS_OPTIONS if name.startswith(("sapo", "vespo"))}


class _Single(int):
    """An int that passes GRPOConfig's check `num_generations < 2`: PPO compares no completions, so 1 is enough."""

    def __lt__(self, other: object) -> bool:
        return False


@documented
@dataclass
class PPOConfig(CorrectionOptions, trl.GRPOConfig):
    """Takes all arguments of `trl.GRPOConfig`, some with other defaults, and those below.

    A batch of generations is used for `num_iterations` epochs over `steps_per_generation` micro-batches, with an
    optimizer step after every `gradient_accumulation_steps` micro-batches. `epsilon`, `epsilon_high` and `delta` clip
    the policy's ratio, `beta` is the coefficient of the KL penalty, `entropy_coef` that of the entropy bonus.
    """

    _VALID_DICT_FIELDS = [*trl.GRPOConfig._VALID_DICT_FIELDS, "rollout_options"]  # noqa: RUF012  # as TRL has it

    num_generations: int | None = field(default=1, metadata={"help": "Number of completions of each prompt."})
    num_iterations: int = field(default=4, metadata={"help": "Epochs over each batch of generations."})
    beta: float = field(default=0.05, metadata={"help": "Coefficient of the KL penalty; 0: no reference model."})
    critic: str = field(
        default="shared",
        metadata={
            "help": "The critic's backbone. shared: the policy's, with a value head on it. separate: a copy of the "
            "policy's with its own parameters. Otherwise the path of a model whose backbone the critic takes, for "
            "example a reward model."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount of flashpo.gae."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of flashpo.gae."})
    whiten_advantages: bool = field(
        default=True,
        metadata={"help": "Standardise advantages over all tokens of a batch of generations, on all processes."},
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Coefficient of the value loss."})
    cliprange_value: float | None = field(
        default=0.2,
        metadata={"help": "How far a value may move from its old value, see flashpo.value_loss; None: no clipping."},
    )
    kl_in: str = field(
        default="reward",
        metadata={
            "help": "Where the KL penalty enters. reward: each token's reward gets -beta (log pi_old - log pi_ref). "
            "loss: beta times the k3 estimate of the KL is added to each token's loss, multiplied by the ratio if "
            "use_bias_correction_kl is set.",
            "choices": ["reward", "loss"],
        },
    )

    def __post_init__(self):
        defaults = {f.name: f.default for f in fields(trl.GRPOConfig)}
        for name, reason in REFUSED.items():
            value: Any = getattr(self, name)
            if value != defaults[name]:
                raise ValueError(f"{name}={value!r} is not supported by PPO: {reason}")
        for name in options.unknown_fields(self, options.GRPO):
            raise ValueError(f"{name}={getattr(self, name)!r} is not supported by PPO, which does not know it")

        def need(fine: bool, name: str, wanted: str) -> None:
            if not fine:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

        need(self.kl_in in ("reward", "loss"), "kl_in", "'reward' or 'loss'")
        need(0 <= self.gamma <= 1, "gamma", "in [0, 1]")
        need(0 <= self.lam <= 1, "lam", "in [0, 1]")
        need(self.vf_coef > 0, "vf_coef", "positive")
        need(self.cliprange_value is None or self.cliprange_value > 0, "cliprange_value", "positive or None")
        generations = self.num_generations or 0
        need(generations >= 1, "num_generations", "at least 1")
        need(bool(self.critic), "critic", "'shared', 'separate' or the path of a model")
        self.num_generations = _Single(generations)
        super().__post_init__()
        self.num_generations = generations
