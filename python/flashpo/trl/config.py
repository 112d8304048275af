"""The options that FlashPO adds to TRL's configurations, in one class for each purpose: token trees, the rollout
engine, weights for the mismatch, and losses and groups. The configurations themselves are in the modules of the
trainers."""

import inspect
import textwrap
from dataclasses import dataclass, field, fields, replace

from flashpo.ops.loss_spec import LossSpec, resolve
from flashpo.rollout import RolloutEngine
from flashpo.trl.options import Known, unknown_fields

# TRL's options that a LossSpec replaces
GRPO_LOSS_OPTIONS = (
    "loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "sapo_temperature_neg",
    "sapo_temperature_pos", "vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg",
    "use_bias_correction_kl", "off_policy_mask_threshold", "top_entropy_quantile", "entropy_coef",
    "use_adaptive_entropy",
)  # fmt: skip


def documented(cls: type) -> type:
    """Append the fields that a configuration adds to TRL's to its docstring. Their texts come from the metadata."""
    inherited = {f.name for base in cls.__mro__ if base.__module__.startswith("trl.") for f in fields(base)}
    own = [f for f in fields(cls) if f.name not in inherited or f.name in vars(cls).get("__annotations__", {})]
    entries = [
        textwrap.fill(
            f"{f.name} ({f.default!r}): {f.metadata['help']}",
            width=116,
            initial_indent="    ",
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
        )
        for f in own
    ]
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nArgs:\n" + "\n".join(entries)
    return cls


@dataclass
class SharingOptions:
    """The fields for token trees, which every configuration has."""

    share_prefix: str = field(  # bool, too; but TRL's command-line parser would take a union with bool for a flag
        default="auto",
        metadata={
            "help": "Whether to score and train on token trees, which compute each distinct token of a micro-batch "
            "once and no padding. 'auto': use trees if the model and the batch allow it, otherwise padded rows after a "
            "warning. True: raise an error if they do not allow it. False: always use padded rows, as TRL does."
        },
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile the decoder layers with torch.compile for token trees, which gives fewer and larger "
            "kernels. Compiling takes about a minute in the first step. Layers that cannot be compiled run uncompiled, "
            "after a warning. This has not run on a GPU yet."
        },
    )

    def __post_init__(self):
        super().__post_init__()  # type: ignore[misc]  # a method of the TRL class
        named = {"true": True, "false": False}
        self.share_prefix = named.get(str(self.share_prefix).lower(), self.share_prefix)  # type: ignore[assignment]
        if self.share_prefix not in ("auto", True, False):
            raise ValueError(f"share_prefix must be 'auto', True or False, got {self.share_prefix!r}")
        if not isinstance(self.compile_layers, bool):
            raise TypeError(f"compile_layers must be True or False, got {self.compile_layers!r}")
        others = {"share_prefix": False, "torch_compile": True}
        for name, value in others.items() if self.compile_layers else ():
            if getattr(self, name) == value:
                raise ValueError(f"compile_layers=True and {name}={value} exclude each other")


@dataclass
class EngineOptions(SharingOptions):
    """Adds the fields for generation, for the configurations of all trainers that sample, PPOConfig included."""

    rollout: str = field(
        default="auto",
        metadata={
            "help": "Who generates completions. 'auto': FlashPO's rollout engine, or TRL after a warning if the "
            "engine cannot. 'engine': raise an error if the engine cannot. 'generate': always TRL."
        },
    )
    rollout_options: dict | str | None = field(
        default=None,
        metadata={
            "help": "Arguments for flashpo.rollout.RolloutEngine, as a dict or as JSON, for example "
            "{'kv_memory': 4000000000}."
        },
    )
    rollout_release: bool = field(
        default=False,
        metadata={
            "help": "Free the engine's KV cache, CUDA graphs and copies of weights after each generation. This leaves "
            "more memory for the update, but the engine has to make them again for the next generation."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rollout not in ("auto", "engine", "generate"):
            raise ValueError(f"rollout must be 'auto', 'engine' or 'generate', got {self.rollout!r}")
        if not isinstance(self.rollout_options, dict | None):
            raise TypeError(f"rollout_options must be a dict or JSON of one, got {self.rollout_options!r}")
        known = [name for name in inspect.signature(RolloutEngine).parameters if name != "model"]
        if unknown := set(self.rollout_options or ()).difference(known):
            raise ValueError(f"rollout_options: {', '.join(sorted(unknown))}: RolloutEngine takes {', '.join(known)}")
        if self.rollout_release and self.rollout == "generate":
            raise ValueError("rollout_release=True frees what the engine keeps: rollout must not be 'generate'")


@dataclass
class CorrectionOptions(EngineOptions):
    """Adds the field for the weights that correct the mismatch between sampler and trainer (GRPO and PPO)."""

    rollout_correction: str = field(
        default="auto",
        metadata={
            "help": "Which log-probs measure the mismatch between sampler and trainer when the engine generates; TRL's "
            "options vllm_importance_sampling_... correct for it. 'auto': those that the trainer computes anyway. If "
            "they contain dropout or other noise, completions get no weights, as in TRL's own generation. 'scored': "
            "under such noise, those of one more forward without the noise."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rollout_correction not in ("auto", "scored"):
            raise ValueError(f"rollout_correction must be 'auto' or 'scored', got {self.rollout_correction!r}")
        if self.rollout_correction == "auto":
            return
        without = {"rollout": "generate", "old_logprobs": "rollout", "vllm_importance_sampling_correction": False}
        for name, value in without.items():
            if getattr(self, name, None) == value:
                raise ValueError(f"rollout_correction='scored' and {name}={value!r} exclude each other")


@dataclass
class PolicyOptions(EngineOptions):
    """Adds the fields that GRPOConfig and RLOOConfig share: loss, groups, old log-probs."""

    loss: str | None = field(
        default=None,
        metadata={
            "help": "The loss: a name in flashpo.LOSSES (dapo, gspo, gmpo, dppo_tv ...) or a flashpo.LossSpec. TRL's "
            "own options for the loss must then keep their defaults. None: TRL's options choose the loss."
        },
    )
    group_by: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of the dataset, or fields that a rollout function returns, by which the completions of a "
            "prompt are split into finer groups for the advantages, such as ['agent', 'turn']."
        },
    )
    dynamic_sampling: int = field(
        default=0,
        metadata={
            "help": "The largest number of extra rounds of generation in which groups with equal rewards are replaced "
            "by fresh prompts (DAPO). 0: such groups stay, with advantage 0."
        },
    )

    old_logprobs: str = field(
        default="trainer",
        metadata={
            "help": "Where the log-probs of the old policy come from, if the policy is updated between sampling and "
            "training. 'trainer': a forward pass. 'rollout': the engine, which knows them from sampling; this saves "
            "the forward pass."
        },
    )
    skip_zero_advantage: bool = field(
        default=True,
        metadata={
            "help": "Leave completions of groups with equal rewards out of the training pass, if the loss gives them "
            "no gradient and token trees are used. A forward without gradient computes their log-probs, so results "
            "and metrics stay the same. False: run them through the training pass, which changes nothing."
        },
    )

    def _check_options(self, loss_options: tuple[str, ...], known: Known) -> None:
        if self.old_logprobs not in ("trainer", "rollout"):
            raise ValueError(f"old_logprobs must be 'trainer' or 'rollout', got {self.old_logprobs!r}")
        if self.old_logprobs == "rollout" and self.rollout == "generate":
            raise ValueError("old_logprobs='rollout' needs the engine: rollout must not be 'generate'")
        if isinstance(self.group_by, str):
            self.group_by = [self.group_by]
        if self.dynamic_sampling < 0:
            raise ValueError(f"dynamic_sampling must not be negative, got {self.dynamic_sampling}")
        if isinstance(self.loss, LossSpec):
            self.loss = self.loss.key
        if self.loss is None:
            return
        resolve(self.loss, ())
        defaults = {f.name: f.default for f in fields(type(self)) if f.name in loss_options}
        changed = [name for name, default in defaults.items() if getattr(self, name) != default]
        changed += unknown_fields(self, known)
        if changed:
            raise ValueError(f"loss={self.loss!r} and {', '.join(changed)} exclude each other: a LossSpec says it all")

    def _with_length(self, spec: LossSpec) -> LossSpec:
        if spec.aggregation == "fixed_length" and spec.max_length is None:
            return replace(spec, max_length=self.max_completion_length)  # type: ignore[attr-defined]  # a field of the TRL class
        return spec
