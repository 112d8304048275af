"""Which options of TRL's configurations our losses and advantages know.

FlashPO computes the loss and the advantages of GRPO and RLOO in place of TRL's code. A later TRL may have values or
fields that FlashPO does not know. These must not be ignored: if one is set, TRL's own code runs. SFT, DPO, KTO and
distillation need no such list, because TRL's own code reads their options.
"""

from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

import transformers


@dataclass(frozen=True)
class Known:
    """The options of one trainer's configuration that we know."""

    loss_values: dict[str, tuple]  # option that our loss reads -> the values that it knows
    advantage_values: dict[str, tuple]  # the same for our advantages
    checked: tuple[str, ...]  # options of the loss or the advantages whose values LossSpec or `group_advantages` checks
    elsewhere: tuple[str, ...]  # options that neither the loss nor the advantages read


# Options that act before a batch has log-probs and rewards, or after the loss; those of transformers are not listed
_ELSEWHERE = (
    "model_init_kwargs", "trust_remote_code", "disable_dropout", "num_generations_eval", "shuffle_dataset",
    "pad_to_multiple_of", "generation_batch_size", "temperature", "top_p", "top_k", "min_p", "generation_kwargs",
    "chat_template_kwargs", "repetition_penalty", "cache_implementation", "ds3_gather_for_generation",
    "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex",
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
    "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
    "mask_truncated_completions", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
    "log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts",
    "use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged",
)  # fmt: skip
_CHECKED = (
    "router_aux_loss_coef", "num_generations", "max_completion_length", "steps_per_generation", "num_iterations",
    "beta", "epsilon", "epsilon_high", "reward_weights",
)  # fmt: skip

GRPO = Known(
    loss_values={
        "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"),
        "importance_sampling_level": ("token", "sequence"),
        "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    },
    advantage_values={
        "scale_rewards": ("group", "batch", "none"),
        "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    },
    checked=(
        *_CHECKED, "delta", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos",
        "vespo_k_neg", "vespo_lambda_neg", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy",
        "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target",
        "vllm_importance_sampling_correction", "vllm_importance_sampling_clip_max",
        "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap", "off_policy_mask_threshold",
        "use_bias_correction_kl",
    ),
    elsewhere=(*_ELSEWHERE, "cast_lm_head_to_fp32", "max_tool_calling_iterations", "log_completions_hub_repo"),
)  # fmt: skip
RLOO = Known(
    loss_values={},
    advantage_values={},
    checked=(*_CHECKED, "normalize_advantages", "reward_clip_range"),
    elsewhere=_ELSEWHERE,
)


def unknown_fields(args: Any, known: Known) -> list[str]:
    """Fields of TRL's configuration classes that this version of FlashPO does not know and that the user has set.

    Fields that a user's subclass adds do not count, because TRL's code does not read them either.
    """
    names = {*known.loss_values, *known.advantage_values, *known.checked, *known.elsewhere}
    names |= {field.name for field in fields(transformers.TrainingArguments)}
    found: dict[str, Any] = {}
    for cls in type(args).__mro__:
        if cls.__module__.partition(".")[0] == "trl" and is_dataclass(cls):
            found |= {field.name: field for field in fields(cls) if field.name not in names and field.init}
    return [name for name, field in found.items() if _is_set(getattr(args, name, None), field)]


def _is_set(value: Any, field: Any) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return value is not default and value != default


def why_trls_loss(trainer: Any, known: Known) -> str:
    """The options because of which TRL must compute the loss; empty if ours knows them all."""
    return _unknown(trainer, known, known.loss_values)


def why_trls_advantages(trainer: Any, known: Known) -> str:
    """The options because of which TRL must compute the advantages; empty if ours knows them all."""
    return _unknown(trainer, known, known.advantage_values)


def _unknown(trainer: Any, known: Known, values: dict[str, tuple]) -> str:
    # a trainer copies these options into attributes with the same names, and TRL's code reads the attributes
    found = [
        (name, getattr(trainer, name)) for name, choices in values.items() if getattr(trainer, name) not in choices
    ]
    found += [(name, getattr(trainer.args, name)) for name in unknown_fields(trainer.args, known)]
    names = ", ".join(f"{name}={value!r}" for name, value in found)
    return f"it does not know {names}" if found else ""
