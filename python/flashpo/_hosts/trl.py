"""TRL: a table of what each of FlashPO's trainers needs from TRL's class, and what `patch()` replaces.

If the installed TRL does not meet a need, only the feature with that need is off. For example, a trainer whose loss
FlashPO does not know still has the rollout engine and token trees. This file imports TRL only when a function needs it.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from flashpo._hosts import Seam, code, versions


class PatchError(RuntimeError):
    """The installed TRL has none of the code that was to be replaced. The message says what it lacks."""


def version() -> str:
    return versions.installed("trl") or "none"


@dataclass(frozen=True)
class Needs:
    """What one feature of FlashPO needs from a trainer class of TRL. Names in a string are separated by spaces."""

    # methods of TRL that ours replace or call -> their parameters; " ..." allows further ones, which we pass on
    methods: dict[str, str] = field(default_factory=dict)
    # methods of ours that TRL's code calls -> into how many names TRL's code unpacks their result
    unpacked: dict[str, int] = field(default_factory=dict)
    # methods of TRL that return a tuple -> the values that we read from it, by the names in the return statement
    returns: dict[str, str] = field(default_factory=dict)
    # functions of the trainer's module that we replace -> the method that calls them by their names there
    functions: dict[str, str] = field(default_factory=dict)
    # functions that we replace -> their parameters, if our function names these
    parameters: dict[str, str] = field(default_factory=dict)
    # attributes that TRL's constructor sets and that we read or write
    attributes: str = ""
    # classes of trl.trainer.utils of which we make instances -> their fields
    output: dict[str, str] = field(default_factory=dict)
    since: str = ""  # the first TRL version that has all this, if not all supported versions have it
    # methods whose mathematics our code repeats -> fingerprints of the versions of their code that ours was compared to
    known_code: dict[str, tuple[str, ...]] = field(default_factory=dict)


LOSS, ADVANTAGES, ROLLOUTS, TREES = "loss", "advantages", "rollout engine", "token trees"
OLD_LOGPROBS, GROUPS, DYNAMIC_SAMPLING = "rollout log-probs", "whole groups", "dynamic sampling"
COMPLETIONS, TEACHERS = "several completions", "several teachers"
SAID = {  # for each feature: what FlashPO does, and what happens if TRL does not meet its needs
    ROLLOUTS: ("generates the completions", "TRL generates"),
    TREES: ("every distinct token of a batch is computed once", "rows are padded, prompts are not shared"),
    ADVANTAGES: ("group_advantages", "TRL computes the advantages"),
    LOSS: ("policy_loss", "TRL computes the loss from our log-probs"),
    GROUPS: ("completions of a prompt stay in one micro-batch", "TRL shuffles them apart"),
    OLD_LOGPROBS: ("old_logprobs='rollout' is available", "old_logprobs='rollout' is an error"),
    DYNAMIC_SAMPLING: ("available", "dynamic_sampling is an error"),
    COMPLETIONS: ("available for each prompt", "num_generations is an error"),
    TEACHERS: ("available", "a dict of teachers is an error"),
}

_FUSED: dict[str, Any] = {
    "since": "1.15",
    "functions": {"add_fused_lm_head": "__init__"},
    "output": {
        "FusedCausalLMOutput": "loss log_probs label_mask entropy log_sum_sq_probs mean_logits is_top1 aux_loss",
    },
}
_LABELLED = {TREES: Needs(attributes="_metrics", **_FUSED)}
_WITH_REFERENCE = {
    TREES: Needs(methods={"compute_ref_log_probs": "self ..."}, attributes="_metrics ref_model", **_FUSED)
}
_SCORE = "_get_per_token_logps_and_entropies"
_OF_SCORING = Needs(
    methods={
        _SCORE: "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss ..."
    },
    unpacked={_SCORE: 3},
    attributes="temperature ref_model",
)
_POLICY = {
    TREES: _OF_SCORING,
    ADVANTAGES: Needs(
        methods={
            "_generate_and_score_completions": "self inputs",
            "_calculate_rewards": "self inputs prompts completions completion_ids_list",
        },
        attributes="_metrics _logs reward_weights num_generations num_generations_eval reward_funcs reward_func_names",
    ),
    GROUPS: Needs(
        methods={"_prepare_inputs": "self generation_batch"}, functions={"shuffle_sequence_dict": "_prepare_inputs"}
    ),
    DYNAMIC_SAMPLING: Needs(attributes="_metrics _step _tokenizer num_generations"),
}
_GENERATING = "_metrics generation_config _dist _tokenizer use_vllm use_transformers_continuous_batching"
_LOSS = "_metrics epsilon_low epsilon_high beta aux_loss_enabled router_aux_loss_coef"
TRAINERS: dict[str, dict[str, Needs]] = {
    "SFTTrainer": _LABELLED,
    "DPOTrainer": _WITH_REFERENCE,
    "KTOTrainer": _WITH_REFERENCE,
    "RewardTrainer": {TREES: Needs(attributes="_metrics")},
    "GRPOTrainer": _POLICY
    | {
        ROLLOUTS: Needs(
            methods={
                "_generate": "self prompts",
                "_generate_single_turn": "self prompt_ids images multimodal_fields ...",
            },
            unpacked={"_generate_single_turn": 2},
            returns={"_generate_single_turn": "completion_ids logprobs"},
            attributes=_GENERATING,
        ),
        OLD_LOGPROBS: dataclasses.replace(
            _OF_SCORING,
            methods=_OF_SCORING.methods | {"_generate": "self prompts"},
            returns={"_generate": "logprobs"},
        ),
        LOSS: Needs(
            methods={"_compute_loss": "self model inputs"},
            known_code={"_compute_loss": ("8b367871012c",)},
            attributes=f"{_LOSS} loss_type importance_sampling_level entropy_coef max_completion_length "
            "vllm_importance_sampling_mode off_policy_mask_threshold top_entropy_quantile use_adaptive_entropy "
            "_entropy_bonus_enabled _entropy_window_stats _last_world_entropy",
        ),
    },
    "RLOOTrainer": _POLICY
    | {
        ROLLOUTS: Needs(
            methods={
                "_generate": "self prompts",
                "_generate_single_turn": "self prompt_ids images multimodal_fields ...",
            },
            unpacked={"_generate_single_turn": 1},
            attributes=_GENERATING,
        ),
        OLD_LOGPROBS: _OF_SCORING,  # our trainer keeps those that our `_generate_single_turn` has just sampled
        LOSS: Needs(
            methods={"_compute_loss": "self model inputs"},
            known_code={"_compute_loss": ("50325e01f920",)},
            attributes=f"{_LOSS} normalize_advantages reward_clip_range",
        ),
    },
    "DistillationTrainer": {
        TREES: Needs(
            methods={
                "_compute_loss": "self unwrapped_student inputs num_items_in_batch",
                "_get_last_hidden_state": "self unwrapped_model input_ids attention_mask logits_to_keep ...",
            },
            returns={"_compute_loss": "loss entropy_sum.detach() n_valid"},
            functions={"_chunked_divergence_loss": "_compute_loss"},
            parameters={
                "_chunked_divergence_loss": "student_hidden_states teacher_hidden_states student_lm_head_weight "
                "teacher_lm_head_weight completion_mask beta num_items_in_batch student_lm_head_bias "
                "teacher_lm_head_bias student_logit_scale teacher_logit_scale student_final_logit_softcapping "
                "teacher_final_logit_softcapping temperature",
            },
            attributes="_metrics temperature teacher_model",
        ),
        ROLLOUTS: Needs(
            methods={
                "_generate": "self prompts",
                "_generate_single_turn": "self prompt_ids images multimodal_fields ...",
            },
            unpacked={"_generate_single_turn": 1},
            attributes="_metrics generation_config _dist _tokenizer use_vllm",
        ),
        GROUPS: _POLICY[GROUPS],
        COMPLETIONS: Needs(
            methods={"_get_train_sampler": "self dataset", "get_train_dataloader": "self"},
            functions={"RepeatSampler": "_get_train_sampler", "repeat_iterable_dataset": "get_train_dataloader"},
        ),
        TEACHERS: Needs(
            methods={"_generate_and_score_completions": "self inputs"},
            functions={"create_model_from_path": "__init__"},
            attributes="teacher_model",
        ),
    },
}

KNOWN_HELPERS = {  # methods that GRPO's loss calls with some options -> fingerprints, as in `known_code`
    "get_high_entropy_mask": ("819de8726d8d",),
    "get_off_policy_mask": ("968d7b538be5",),
    "get_gamma_weights": ("3b22382f4aef",),
}

# What `flashpo.trl.patch` replaces in trl.trainer.utils, and which functions there have to use it

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # of the fused head, besides log_probs
HEAD = "_ChunkedLogProbFunction"
DIVERGENCE = "ChunkedDivergenceFunction"
_DIVERGENCE_PARAMETERS = (
    "ctx student_hidden student_weight student_bias teacher_hidden teacher_weight teacher_bias beta temperature "
    "student_logit_scale student_final_logit_softcapping teacher_logit_scale teacher_final_logit_softcapping"
)
_HEAD_ARGUMENTS = ("weight", "bias", "temperature", "final_logit_softcapping", "logit_scale", "outputs")
_OF_LOGITS = ("selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits")
_LOGITS = {
    "_supports_trl_loss_kernel": "logits index row_mask",
    "_fused_logprob_entropy": "logits index temperature row_mask",
}


def why_no_head(utils: ModuleType) -> str:
    """Why TRL's fused head cannot be replaced; empty if it can."""
    add = getattr(utils, "add_fused_lm_head", None)
    return "trl.trainer.utils.add_fused_lm_head is missing" if add is None else _why_no_head(add)


@functools.cache
def _why_no_head(add: Any) -> str:
    calls = code.arguments(add, f"{HEAD}.apply")
    if [call[1:3] + call[4:5] + call[6:] for call in calls] != [_HEAD_ARGUMENTS]:  # leaves out tokens and chunk size
        return f"add_fused_lm_head calls {HEAD} with {calls}"
    if ("log_probs", *OUTPUTS) not in code.assigned(add):
        return f"add_fused_lm_head does not take log_probs, {', '.join(OUTPUTS)} from {HEAD}"
    if not {HEAD, "maybe_gather_lm_head_ctx"} <= code.names(add):
        return f"add_fused_lm_head does not read {HEAD} and maybe_gather_lm_head_ctx"
    return ""


def why_no_logits(utils: ModuleType) -> str:
    """Why TRL's kernel for logits cannot be replaced; empty if it can."""
    for name, wanted in _LOGITS.items():
        function = getattr(utils, name, None)
        if function is None and name == "_fused_logprob_entropy":
            continue  # TRL has it only where Triton is installed
        if function is None:
            return f"trl.trainer.utils.{name} is missing"
        if other := _other_parameters(function, wanted):
            return f"trl.trainer.utils.{name} is {other}"
    for reader in _OF_LOGITS:
        if not set(_LOGITS) <= code.names(getattr(utils, reader, len)):
            return f"trl.trainer.utils.{reader} does not read {' and '.join(_LOGITS)}"
    return ""


def why_no_divergence(module: ModuleType) -> str:
    """Why the divergence of `trl.trainer.distillation_trainer` cannot be replaced; empty if it can."""
    reader, divergence = (getattr(module, name, None) for name in ("_chunked_divergence_loss", DIVERGENCE))
    if reader is None or not {DIVERGENCE, "_use_triton"} <= code.names(reader):
        return f"{module.__name__}._chunked_divergence_loss does not read {DIVERGENCE} and _use_triton"
    if divergence is None:
        return f"{module.__name__}.{DIVERGENCE} is missing"
    other = _other_parameters(divergence.forward, _DIVERGENCE_PARAMETERS)
    return f"{module.__name__}.{DIVERGENCE}.forward is {other}" if other else ""


@functools.cache
def _other_parameters(function: Any, wanted: str) -> str:
    found = " ".join(code.parameters(function))
    return "" if found == wanted else f"({found}), FlashPO knows ({wanted})"


def scoring_seams() -> list[Seam]:
    utils = importlib.import_module("trl.trainer.utils")
    return [
        Seam("fused head", "linear_logprob", "TRL's own scores hidden states", why_no_head(utils)),
        Seam("scoring of logits", "selective_log_softmax", "TRL's own scores logits", why_no_logits(utils)),
    ]


def divergence_seam() -> Seam:
    """The seam of the divergence. It is not one of `scoring_seams`, because looking at it imports a trainer."""
    if lacks("DistillationTrainer"):
        reason = f"TRL {version()} has no DistillationTrainer"
    else:
        reason = why_no_divergence(importlib.import_module(_module_of("DistillationTrainer")))
    return Seam("divergence of distillation", "linear_divergence", "TRL's own compares student and teacher", reason)


@functools.cache
def why_not(trl_class: type, what: str) -> str:
    """Why a trainer class of TRL does not meet the needs of the feature `what`; empty if it does."""
    needs = TRAINERS[trl_class.__name__].get(what)
    if needs is None:
        return f"TRL's {trl_class.__name__} has no place for it"
    problem = next(_problems(trl_class, needs), "")
    advice = f"; trl {needs.since} would do" if needs.since and versions.older(version(), needs.since) else ""
    return f"TRL {version()}: {problem}{advice}" if problem else ""


def trainer_class(name: str) -> type:
    """TRL's own trainer class, even if `flashpo run` has replaced its name in the package."""
    return getattr(importlib.import_module(_module_of(name)), name)


def lacks(name: str) -> bool:
    """Whether TRL has no such trainer among its stable ones. Another version of TRL may have it elsewhere."""
    return importlib.util.find_spec(_module_of(name)) is None


def _module_of(name: str) -> str:
    return f"trl.trainer.{name.removesuffix('Trainer').lower()}_trainer"


def seams(trl_class: type) -> list[Seam]:
    return [
        Seam(f"{trl_class.__name__}, {what}", *SAID[what], why_not(trl_class, what))
        for what in TRAINERS[trl_class.__name__]
    ]


def why_unknown(trl_class: type, helper: str) -> str:
    """Why the code of a method that TRL's loss calls is not the code that ours repeats; empty if it is."""
    return next(_of_code(trl_class, helper, KNOWN_HELPERS[helper]), "")


def place_of(trl_class: type, method: str, value: str) -> int:
    """The index of `value` in the tuple that a method returns, by the names in its return statement.

    `why_not` must have found that the tuple can be read.
    """
    return code.returned(getattr(trl_class, method))[0].index(value)


def _problems(trl_class: type, needs: Needs) -> Iterator[str]:
    module = importlib.import_module(trl_class.__module__)
    where = trl_class.__name__
    for name, wanted in needs.methods.items():
        function = getattr(trl_class, name, None)
        if function is None:
            yield f"{where}.{name} is missing"
        elif not _begins(code.parameters(function), wanted):
            yield f"{where}.{name} is ({' '.join(code.parameters(function))}), FlashPO knows ({wanted})"
    for name, count in needs.unpacked.items():
        for caller in _callers(trl_class, name):
            for found in code.unpacked(getattr(trl_class, caller), name) - {count}:
                yield f"{where}.{caller} takes apart {found} values of {name}, FlashPO gives {count}"
    for name, wanted in needs.returns.items():
        found_tuples = code.returned(getattr(trl_class, name))
        if not found_tuples:
            yield f"{where}.{name} returns no tuple that can be read"
        for values in found_tuples:
            if missing := [value for value in wanted.split() if value not in values]:
                yield f"{where}.{name} returns ({', '.join(values)}), without {', '.join(missing)}"
            if values != found_tuples[0]:
                yield f"{where}.{name} returns tuples of several kinds"
    for name, method in needs.functions.items():
        if getattr(module, name, None) is None or name not in code.names(getattr(trl_class, method)):
            yield f"{where}.{method} does not call {name} by its name in {module.__name__}"
    for name, wanted in needs.output.items():
        fields = dataclasses.fields(getattr(importlib.import_module("trl.trainer.utils"), name))
        if differing := sorted({x.name for x in fields} ^ set(wanted.split())):
            yield f"trl.trainer.utils.{name} differs from the one that FlashPO knows in {', '.join(differing)}"
    for name, wanted in needs.parameters.items():
        if other := _other_parameters(getattr(module, name), wanted):
            yield f"{module.__name__}.{name} is {other}"
    if unset := sorted(set(needs.attributes.split()) - code.names(trl_class.__init__)):  # type: ignore[misc]
        yield f"{where}.__init__ does not set {', '.join(unset)}"
    for name, known in needs.known_code.items():
        yield from _of_code(trl_class, name, known)


def _begins(found: tuple[str, ...], wanted: str) -> bool:
    begins, more, _ = wanted.partition(" ...")
    names = tuple(begins.split())
    if "args" in found:  # a dispatcher, which passes the arguments of its caller on
        return found[: found.index("args")] == names[: found.index("args")]
    return found == names or (bool(more) and found[: len(names)] == names)


def _callers(trl_class: type, method: str) -> list[str]:
    """The methods of TRL's own classes that call `self.method`."""
    defined = {name for cls in trl_class.__mro__ if cls.__module__.startswith("trl.") for name in vars(cls)}
    functions = {name: getattr(trl_class, name) for name in sorted(defined)}
    return [name for name, f in functions.items() if inspect.isfunction(f) and method in code.names(f)]


def _of_code(trl_class: type, name: str, known: tuple[str, ...]) -> Iterator[str]:
    found = code.fingerprint(getattr(trl_class, name))
    if not found:
        yield f"the source of {trl_class.__name__}.{name} is not at hand"
    elif found not in known:
        yield f"{trl_class.__name__}.{name} is other code than FlashPO knows"


# What FlashPO calls in TRL


@contextlib.contextmanager
def generating(trainer: Any, name: str) -> Iterator[Any]:
    """Yields the model as TRL generates with it: unwrapped, gathered and without gradient checkpointing.

    TRL's profiling logs the time under `name`.
    """
    from trl.models import unwrap_model_for_generation

    args = trainer.args
    options = {
        "gather_deepspeed3_params": getattr(args, "ds3_gather_for_generation", True),
        "generation_kwargs": getattr(trainer, "generation_kwargs", None),
        "gradient_checkpointing_kwargs": args.gradient_checkpointing_kwargs,
    }
    known = {key: x for key, x in options.items() if code.takes(unwrap_model_for_generation, key)}
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            from trl.extras.profiling import profiling_context

            stack.enter_context(profiling_context(trainer, name))
        model = stack.enter_context(unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, **known))
        stack.enter_context(trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False))
        yield model


@contextlib.contextmanager
def disable_gradient_checkpointing(model: Any, options: dict | None) -> Iterator[None]:
    """Does what TRL's function of the same name does for a forward without gradients."""
    if not model.is_gradient_checkpointing:
        yield
        return
    model.gradient_checkpointing_disable()
    try:
        yield
    finally:
        model.gradient_checkpointing_enable(options)


def fused_output() -> type:
    """The class of the output of a model with TRL's fused head."""
    from trl.trainer.utils import FusedCausalLMOutput

    return FusedCausalLMOutput


def prepare_deepspeed(model: Any, accelerator: Any) -> Any:
    """Prepares a model that is not trained for DeepSpeed."""
    from trl import models

    return models.prepare_deepspeed(model, accelerator)
