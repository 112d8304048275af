"""What FlashPO does for the trainers in `trl.experimental`, by their packages there.

They are classes of their own, and most call the model for whole logits. Where they hand these to TRL's functions for
log-probs, `patch()` reaches them; where they hand them to torch, nothing is replaced. Where the rows of a batch are
padded on the right, `share_prompts` lets the layers below the head compute each distinct token of a batch once.
"""

from typing import Any, NamedTuple

from flashpo.trl._fallback import Fallback


class Experimental(NamedTuple):
    trainer: str
    ops: tuple[str, ...]  # operators of ours that run under `patch()`, by how their names begin
    rest: str  # why not more
    shares: bool = False  # whether `share_prompts` knows it


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
    """The entry of a class of TRL's, or of one derived from it."""
    for base in cls.__mro__:
        if base.__module__.startswith("trl.experimental."):
            return EXPERIMENTAL.get(base.__module__.split(".")[2])
    return None


def share_prompts(trainer: Any) -> None:
    """Let an experimental trainer's model run each distinct token of a batch once, below its head; for good.

    `flashpo run` does it when such a trainer begins to train. Loss and gradients stay TRL's. Padding has logits of 0
    then, so the means of whole logits that CPO and ORPO log (`logits/chosen`, `logits/rejected`), which count padding,
    are others.

    A second call does nothing.

    Args:
        trainer: one that `EXPERIMENTAL` says `shares`, or of a class derived from such a one; before it trains.

    Raises:
        TypeError: it is another.
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
    """As Markdown, for docs/trainers.md."""
    names = {"selective_log_softmax": "log-probs and entropies", "linear_logprob": "LM head and log-probs"}
    names["linear_divergence"] = "both LM heads and their divergence"
    rows = [
        f"| `trl.experimental.{package}.{known.trainer}` | {', '.join(names[op] for op in known.ops) or 'nothing'} | "
        f"{'yes' if known.shares else ''} | {known.rest} |"
        for package, known in EXPERIMENTAL.items()
    ]
    titles = "| trainer | by FlashPO under `patch()` | prompts shared under `flashpo run` | why not more |"
    return "\n".join([titles, "| --- | --- | --- | --- |", *rows])
