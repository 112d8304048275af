"""What `patch()` does for the trainers in `trl.experimental`, by their packages there.

They are classes of their own, and most call the model for whole logits. Where they hand these to TRL's functions for
log-probs, `patch()` reaches them; where they hand them to torch, nothing is replaced.
"""

from typing import NamedTuple


class Experimental(NamedTuple):
    trainer: str
    ops: tuple[str, ...]  # operators of ours that run under `patch()`, by how their names begin
    rest: str  # why not more


_LOGITS = "the model gives it whole logits"
_IN_TORCH = f"{_LOGITS}, which it compares in plain torch"
_METRICS = f"{_LOGITS}, whose mean it logs"
_LOGPROBS, _HEAD = ("selective_log_softmax",), ("linear_logprob",)

EXPERIMENTAL = {
    "a2po": Experimental("A2POTrainer", _LOGPROBS, _LOGITS),
    "async_distillation": Experimental("AsyncDistillationTrainer", (), "its teachers are servers that send top-k"),
    "async_grpo": Experimental("AsyncGRPOTrainer", _HEAD, "vLLM generates, in a process of its own"),
    "bema_for_ref_model": Experimental("DPOTrainer", _HEAD, "it is derived from TRL's own DPOTrainer"),
    "cpo": Experimental("CPOTrainer", _LOGPROBS, _METRICS),
    "distillation": Experimental(
        "DistillationTrainer", ("linear_divergence",), "it is derived from TRL's own DistillationTrainer"
    ),
    "gkd": Experimental("GKDTrainer", (), _IN_TORCH),
    "gmpo": Experimental("GMPOTrainer", _HEAD, "it is derived from TRL's own GRPOTrainer; flashpo has loss='gmpo'"),
    "gold": Experimental("GOLDTrainer", (), _IN_TORCH),
    "iw_opd": Experimental("IWOPDTrainer", (), _IN_TORCH),
    "kto": Experimental("KTOTrainer", _HEAD, "it is derived from TRL's own KTOTrainer"),
    "online_dpo": Experimental("OnlineDPOTrainer", (), _IN_TORCH),
    "orpo": Experimental("ORPOTrainer", _LOGPROBS, _METRICS),
    "sdft": Experimental("SDFTTrainer", _LOGPROBS, f"{_LOGITS}; all but log-probs of sampled tokens is in plain torch"),
    "sdpo": Experimental("SDPOTrainer", _LOGPROBS, f"{_LOGITS}; all but log-probs of sampled tokens is in plain torch"),
    "server_distillation": Experimental("ServerDistillationTrainer", (), "its teacher is a server that sends top-k"),
    "tpo": Experimental("TPOTrainer", _LOGPROBS, _METRICS),
}


def table() -> str:
    """As Markdown, for docs/trainers.md."""
    names = {"selective_log_softmax": "log-probs and entropies", "linear_logprob": "LM head and log-probs"}
    names["linear_divergence"] = "both LM heads and their divergence"
    rows = [
        f"| `trl.experimental.{package}.{known.trainer}` | {', '.join(names[op] for op in known.ops) or 'nothing'} | "
        f"{known.rest} |"
        for package, known in EXPERIMENTAL.items()
    ]
    return "\n".join(["| trainer | by FlashPO under `patch()` | why not more |", "| --- | --- | --- |", *rows])
