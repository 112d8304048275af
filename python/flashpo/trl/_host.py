"""What FlashPO relies on in TRL's internals, in one table, and the check that the installed TRL has it.

A seam that has changed is refused by name before anything is replaced: a method that returns one value more, say, would
otherwise be read at the wrong place in silence.
"""

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, ModuleType
from typing import Any, NoReturn


class PatchError(RuntimeError):
    """The installed TRL is not the one that FlashPO knows."""


OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # of the fused head, besides log_probs

# `flashpo.trl.patch` replaces names of trl.trainer.utils: their parameters, and the functions that have to read them
UTILS = {
    "_ChunkedLogProbFunction.forward": "ctx hidden weight bias targets temperature chunk_size "
    "final_logit_softcapping logit_scale outputs",
    "_use_triton": "device",
    "_supports_trl_loss_kernel": "logits index row_mask",
    "_fused_logprob_entropy": "logits index temperature row_mask",
    "maybe_gather_lm_head_ctx": "params",
    "add_fused_lm_head": "model temperature cast_lm_head_to_fp32 outputs",
}
_OF_LOGITS = ("is_triton_available", "_supports_trl_loss_kernel", "_fused_logprob_entropy")
READERS = {
    "add_fused_lm_head": ("_ChunkedLogProbFunction", "_use_triton", "maybe_gather_lm_head_ctx"),
    "selective_log_softmax": _OF_LOGITS,
    "selective_log_softmax_and_entropy": _OF_LOGITS,
    "entropy_from_logits": _OF_LOGITS,
}


@dataclass(frozen=True)
class Seams:
    """What our subclass of a trainer needs of TRL's class. Names in a string are separated by spaces."""

    # our method overrides it, or calls it: its parameters; after " ..." there may be more, which we pass on
    methods: dict[str, str]
    # the names of the values that a method returns, which we read by their places
    returns: dict[str, str] = field(default_factory=dict)
    # functions of the trainer's module that we replace, and the method that calls them
    functions: dict[str, str] = field(default_factory=dict)
    # their parameters, where ours names them
    parameters: dict[str, str] = field(default_factory=dict)
    # attributes that the constructor sets and we read or write
    attributes: str = ""
    # of `_generate_and_score_completions`: results of scoring, which we tell apart by the order in which they are made
    scorings: str = ""


_LABELLED = Seams(
    methods={"compute_loss": "self model inputs return_outputs num_items_in_batch"},
    functions={"add_fused_lm_head": "__init__"},
    attributes="_metrics",
)
_WITH_REFERENCE = Seams(
    methods={"compute_ref_log_probs": "self model inputs", "__init__": "self model ref_model args ..."},
    functions=_LABELLED.functions,
    attributes="_metrics ref_model",
)
_POLICY_METHODS = {
    "_get_per_token_logps_and_entropies": "self model input_ids attention_mask logits_to_keep batch_size "
    "compute_entropy compute_aux_loss pixel_values image_grid_thw num_images pixel_attention_mask spatial_shapes "
    "num_tiles image_sizes token_type_ids mm_token_type_ids image_position_ids",
    "_prepare_inputs": "self generation_batch",
    "_generate": "self prompts",
    "_generate_and_score_completions": "self inputs",
    "_calculate_rewards": "self inputs prompts completions completion_ids_list",
    "_compute_loss": "self model inputs",
    "log": "self logs ...",
}
_SCORES = {"_get_per_token_logps_and_entropies": "logps entropies aux_loss"}
_POLICY_ATTRIBUTES = (
    "_metrics _logs _step _buffered_inputs _dist _tokenizer generation_config generation_kwargs reward_weights "
    "num_generations num_generations_eval temperature pad_to_multiple_of aux_loss_enabled router_aux_loss_coef "
    "epsilon_low epsilon_high beta ref_model max_completion_length use_vllm use_transformers_continuous_batching "
    "reward_funcs reward_func_names"
)
TRAINERS = {
    "SFTTrainer": _LABELLED,
    "DPOTrainer": _WITH_REFERENCE,
    "KTOTrainer": _WITH_REFERENCE,
    "RewardTrainer": Seams(methods=_LABELLED.methods, attributes="_metrics"),
    "GRPOTrainer": Seams(
        methods=_POLICY_METHODS
        | {
            "_generate_single_turn": "self prompt_ids images multimodal_fields ...",
            "get_high_entropy_mask": "self entropies mask threshold",
            "get_off_policy_mask": "advantages per_token_logps sampling_per_token_logps mask off_policy_threshold",
            "get_gamma_weights": "advantages log_ratio_per_token mask importance_sampling_ratio k_pos lambda_pos "
            "k_neg lambda_neg",
        },
        returns=_SCORES
        | {
            "_generate": "prompt_ids completion_ids tool_mask completions logprobs extra_fields images tool_images",
            "_generate_single_turn": "completion_ids logprobs",
        },
        functions={"shuffle_sequence_dict": "_prepare_inputs"},
        attributes=f"{_POLICY_ATTRIBUTES} loss_type importance_sampling_level scale_rewards entropy_coef "
        "multi_objective_aggregation vllm_importance_sampling_mode off_policy_mask_threshold top_entropy_quantile "
        "use_adaptive_entropy _entropy_bonus_enabled _entropy_window_stats _last_world_entropy",
        scorings="old_per_token_logps ref_per_token_logps",
    ),
    "RLOOTrainer": Seams(
        methods=_POLICY_METHODS | {"_generate_single_turn": "self prompt_ids images multimodal_fields"},
        returns=_SCORES,
        functions={"shuffle_sequence_dict": "_prepare_inputs"},
        attributes=f"{_POLICY_ATTRIBUTES} normalize_advantages reward_clip_range",
        scorings="old_per_token_logps ref_per_token_logps",
    ),
    "DistillationTrainer": Seams(
        methods={
            "compute_loss": _LABELLED.methods["compute_loss"],
            "_compute_loss": "self unwrapped_student inputs num_items_in_batch",
            "_get_last_hidden_state": "self unwrapped_model input_ids attention_mask logits_to_keep pixel_values "
            "image_grid_thw pixel_attention_mask spatial_shapes image_sizes token_type_ids mm_token_type_ids "
            "image_position_ids",
            "_prepare_inputs": "self generation_batch",
            "_generate": "self prompts",
            "_generate_single_turn": "self prompt_ids images multimodal_fields ...",
            "_generate_and_score_completions": "self inputs",
            "_get_train_sampler": "self dataset",
            "get_train_dataloader": "self",
            "log": "self logs ...",
        },
        returns={"_compute_loss": "loss entropy_sum.detach() n_valid"},
        functions={
            "create_model_from_path": "__init__",
            "_chunked_divergence_loss": "_compute_loss",
            "RepeatSampler": "_get_train_sampler",
            "repeat_iterable_dataset": "get_train_dataloader",
            "shuffle_sequence_dict": "_prepare_inputs",
        },
        parameters={
            "_chunked_divergence_loss": "student_hidden_states teacher_hidden_states student_lm_head_weight "
            "teacher_lm_head_weight completion_mask beta num_items_in_batch student_lm_head_bias teacher_lm_head_bias "
            "student_logit_scale teacher_logit_scale student_final_logit_softcapping "
            "teacher_final_logit_softcapping temperature",
        },
        attributes="_metrics _step _buffered_inputs _dist _tokenizer generation_config generation_kwargs temperature "
        "pad_to_multiple_of max_completion_length use_vllm teacher_model",
    ),
}


def check(utils: ModuleType) -> None:
    """Raise PatchError unless `trl.trainer.utils` has the seams of `flashpo.trl.patch`."""
    from trl.kernels import chunked_logprob

    where = "trl.trainer.utils"
    for name, wanted in UTILS.items():
        seam: Any = utils
        for part in name.split("."):
            seam = getattr(seam, part, None)
        if seam is None and name == "_fused_logprob_entropy" and not utils.is_triton_available():
            continue  # TRL defines it only where Triton is installed
        _check_parameters(f"{where}.{name}", seam, wanted)
    for name, names in READERS.items():
        reader: Any = getattr(utils, name, None)
        if reader is None:
            _refuse(f"{where}.{name}", "missing", "a function")
        if unread := set(names) - _names(reader):
            _refuse(f"{where}.{name}", f"without {unread}", f"one that reads {names}")
    if chunked_logprob.OPTIONAL_OUTPUTS != OUTPUTS:
        _refuse(f"{where}._ChunkedLogProbFunction's outputs", chunked_logprob.OPTIONAL_OUTPUTS, OUTPUTS)


def check_distillation(module: ModuleType) -> None:
    """The same of `trl.trainer.distillation_trainer`."""
    where, wanted = module.__name__, ("ChunkedDivergenceFunction", "_use_triton")
    reader: Any = getattr(module, "_chunked_divergence_loss", None)
    if reader is None or set(wanted) - _names(reader):
        _refuse(f"{where}._chunked_divergence_loss", "missing or another", f"one that reads {wanted}")
    _check_parameters(f"{where}._use_triton", getattr(module, "_use_triton", None), UTILS["_use_triton"])
    divergence = getattr(module, "ChunkedDivergenceFunction", None)
    _check_parameters(
        f"{where}.ChunkedDivergenceFunction.forward",
        getattr(divergence, "forward", None),
        "ctx student_hidden student_weight student_bias teacher_hidden teacher_weight teacher_bias beta temperature "
        "student_logit_scale student_final_logit_softcapping teacher_logit_scale teacher_final_logit_softcapping",
    )


@functools.cache
def check_trainer(trl_class: type) -> None:
    """Raise PatchError unless a trainer class of TRL has the seams of our subclass. Once for each class."""
    seams, module = TRAINERS[trl_class.__name__], importlib.import_module(trl_class.__module__)
    where = f"{trl_class.__module__}.{trl_class.__name__}"
    for name, wanted in seams.methods.items():
        _check_parameters(f"{where}.{name}", getattr(trl_class, name, None), wanted)
    for name, wanted in seams.returns.items():
        for found in _returned(getattr(trl_class, name)):
            if found != wanted:
                _refuse(f"what {where}.{name} returns", f"({found})", f"({wanted})")
    for name, method in seams.functions.items():
        if getattr(module, name, None) is None or name not in _names(getattr(trl_class, method)):
            _refuse(f"{where}.{method}", f"without {name}", "one that calls it by its name in the module")
    for name, wanted in seams.parameters.items():
        _check_parameters(f"{trl_class.__module__}.{name}", getattr(module, name), wanted)
    if unset := set(seams.attributes.split()) - _names(getattr(trl_class, "__init__")):  # noqa: B009  # for mypy
        _refuse(f"{where}.__init__", f"without {', '.join(sorted(unset))}", "one that sets such attributes")
    if seams.scorings:
        method = f"{where}._generate_and_score_completions"
        made: Any = inspect.unwrap(trl_class._generate_and_score_completions)  # type: ignore[attr-defined]
        order = [name for name in made.__code__.co_varnames if name in seams.scorings.split()]  # by first assignment
        if " ".join(order) != seams.scorings:
            _refuse(f"the order of scoring in {method}", order, seams.scorings)


def _refuse(what: str, found: object, wanted: object) -> NoReturn:
    import trl

    raise PatchError(
        f"TRL {trl.__version__}: {what} is {found}, FlashPO was written for {wanted}. "
        "Install trl 1.16, or a FlashPO that knows this TRL."
    )


def _check_parameters(what: str, function: Callable | None, wanted: str) -> None:
    if function is None:
        _refuse(what, "missing", f"({wanted})")
    found = " ".join(inspect.signature(function).parameters)
    begins, more, _ = wanted.partition(" ...")
    if not (found == begins or (more and found.startswith(f"{begins} "))):
        _refuse(what, f"({found})", f"({wanted})")


def _names(function: Callable) -> set[str]:
    """What a function's code, and that of the functions in it, reads and sets by name."""

    def of(code: CodeType) -> set[str]:
        return set(code.co_names).union(*(of(x) for x in code.co_consts if isinstance(x, CodeType)))

    unwrapped: Any = inspect.unwrap(function)
    return of(unwrapped.__code__)


def _returned(function: Callable) -> list[str]:
    """The tuples that a function itself returns, as their names; none where its source is not at hand."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except OSError:
        return []
    found: list[str] = []
    inner: list[ast.AST] = [ast.parse(source).body[0]]
    while inner:
        for node in ast.iter_child_nodes(inner.pop()):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                found.append(" ".join(ast.unparse(x) for x in node.value.elts))
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inner.append(node)
    return found
