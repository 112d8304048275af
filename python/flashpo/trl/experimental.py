"""What FlashPO does for each trainer in `trl.experimental`.

Most of these trainers call the model for whole logits. If they pass the logits to TRL's functions for log-probs,
`patch()` replaces these functions; if they pass them to torch, nothing is replaced. If a trainer pads the rows of a
batch on the right, `share_prompts` lets the layers below the head compute each distinct token of a batch once.
"""

from typing import Any, NamedTuple

from flashpo.trl._fallback import Fallback


class Experimental(NamedTuple):
    trainer: str
    ops: tuple[str, ...]  # prefixes of our operators that run under `patch()`
    rest: str  # why no more of FlashPO runs
    shares: bool = False  # whether `share_prompts` supports it


_LOGITS = "the model gives it whole logits"
_IN_TORCH = f"{_LOGITS}, which it compares in plain torch"
_METRICS = f"{_LOGITS}, whose mean it logs"
_LOGPROBS, _HEAD = ("selective_log_softmax",), ("linear_logprob",)

EXPERIMENTAL = {
    "a2po": Experimental("A2POTrainer", _LOGPROBS, _LOGITS),
    "async_distillation": Experimental("AsyncDistillationTrainer", (), "its teachers are servers that send top-k"),
    "async_grpo": Experimental("AsyncGRPOTrainer", _HEAD, "vLLM generates, in a process of its own"),
    "bema_for_ref_model": Experimental("DPOTrainer", _HEAD, "it is derived from TRL's own DPOTrainer"),
    "cpo": Experimental("CPOTrainer", _LOGPROBS, _METRICS, shares=True),
    "distillation": Experimental(
        "DistillationTrainer", ("linear_divergence",), "it is derived from TRL's own DistillationTrainer"
    ),
    "gkd": Experimental("GKDTrainer", (), _IN_TORCH),
    "gmpo": Experimental("GMPOTrainer", _HEAD, "it is derived from TRL's own GRPOTrainer; flashpo has loss='gmpo'"),
    "gold": Experimental("GOLDTrainer", (), _IN_TORCH),
    "iw_opd": Experimental("IWOPDTrainer", (), _IN_TORCH),
    "kto": Experimental("KTOTrainer", _HEAD, "it is derived from TRL's own KTOTrainer"),
    "online_dpo": Experimental("OnlineDPOTrainer", (), _IN_TORCH),
    "orpo": Experimental("ORPOTrainer", _LOGPROBS, _METRICS, shares=True),
    "sdft": Experimental("SDFTTrainer", _LOGPROBS, f"{_LOGITS}; all but log-probs of sampled tokens is in plain torch"),
    "sdpo": Experimental("SDPOTrainer", _LOGPROBS, f"{_LOGITS}; all but log-probs of sampled tokens is in plain torch"),
    "server_distillation": Experimental("ServerDistillationTrainer", (), "its teacher is a server that sends top-k"),
    "tpo": Experimental("TPOTrainer", _LOGPROBS, _METRICS, shares=True),
}


def of(cls: type) -> Experimental | None:
    """The entry of a class of TRL, or of a class derived from it; None if there is none."""
    for base in cls.__mro__:
        if base.__module__.startswith("trl.experimental."):
            return EXPERIMENTAL.get(base.__module__.split(".")[2])
    return None


def share_prompts(trainer: Any) -> None:
    """Let the layers below the head of an experimental trainer's model compute each distinct token of a batch once.

    `flashpo run` calls this when such a trainer begins to train. Loss and gradients stay TRL's. The logits of padding
    become 0. Therefore the means of whole logits that CPO and ORPO log (`logits/chosen`, `logits/rejected`) change,
    because they count padding. This cannot be undone; a second call does nothing.

    Args:
        trainer: a trainer whose entry in `EXPERIMENTAL` has `shares`, or one of a class derived from it. It must not
            have begun to train.

    Raises:
        TypeError: it is another trainer.
    """
    from flashpo.trl.reward_models import run_on_trees  # these import transformers
    from flashpo.trl.sharing import Sharing

    known = of(type(trainer))
    if known is None or not known.shares:
        names = ", ".join(x.trainer for x in EXPERIMENTAL.values() if x.shares)
        raise TypeError(f"trainer must be one of TRL's {names}, got a {type(trainer).__name__}")
    if hasattr(trainer, "_shares_prompts"):
        return
    trainer._shares_prompts = True
    refuse = Fallback(f"FlashPO runs the model of {known.trainer} on padded rows: {{reason}}.")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return refuse("it is sharded only when it trains")
    accelerator = trainer.accelerator
    run_on_trees(accelerator, accelerator.unwrap_model(trainer.model), refuse.allows, Sharing(trainer.args))


def table() -> str:
    """EXPERIMENTAL as a Markdown table, for docs/trainers.md."""
    names = {"selective_log_softmax": "log-probs and entropies", "linear_logprob": "LM head and log-probs"}
    names["linear_divergence"] = "both LM heads and their divergence"
    rows = [
        f"| `trl.experimental.{package}.{known.trainer}` | {', '.join(names[op] for op in known.ops) or 'nothing'} | "
        f"{'yes' if known.shares else ''} | {known.rest} |"
        for package, known in EXPERIMENTAL.items()
    ]
    titles = "| trainer | by FlashPO under `patch()` | prompts shared under `flashpo run` | why not more |"
    return "\n".join([titles, "| --- | --- | --- | --- |", *rows])
