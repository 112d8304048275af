"""Tiny models of many families, and batches that they score both padded, as stock trainers do, and as token trees."""

import dataclasses

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl_models import SMALL

from flashpo.packing import forward, pack
from flashpo.packing.scoring import accept_trees

WINDOW = 5  # far shorter than the rows
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen2 window": lambda: transformers.Qwen2Config(**SMALL, **LOCAL, use_sliding_window=True),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, **LOCAL, head_dim=16, query_pre_attn_scalar=9, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, **LOCAL, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=WINDOW),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "phimoe": lambda: transformers.PhimoeConfig(
        **SMALL, num_local_experts=4, sliding_window=WINDOW, router_jitter_noise=0.0
    ),
    "olmo2": lambda: transformers.Olmo2Config(**SMALL),
    "gpt_oss": lambda: transformers.GptOssConfig(**SMALL, **LOCAL, head_dim=16, num_local_experts=4),
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=4.0),
    "phi": lambda: transformers.PhiConfig(**{**SMALL, "num_key_value_heads": 2}),
    "nemotron": lambda: transformers.NemotronConfig(**SMALL),  # drops keywords on the way to its attention
    "stablelm": lambda: transformers.StableLmConfig(**SMALL),  # this one, too
}  # fmt: skip


def make(kind: str, dtype: torch.dtype = torch.float64, attention: str | None = None):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[kind](), dtype=dtype, attn_implementation=attention, experts_implementation="eager"
    )
    for name, parameter in model.named_parameters():
        if "sinks" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    if dtype == torch.float64 and model.config._attn_implementation == "eager":
        accept_trees(model)  # unasked: eager attention in fp64 makes NaN of padding
    return model


@dataclasses.dataclass
class Batch:
    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    completion_mask: Tensor  # (B, C)
    upstream: Tensor  # (2, B, C): gradients of the log-probs and entropies

    @classmethod
    def of(cls, rows: list[list[int]], scored: list[int], left: bool = True, padding: int = 3) -> "Batch":
        """The last `scored` tokens of each row are, padding in between left out at random."""
        width = max(map(len, rows)) + padding
        ids, live, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
        for i, (row, n) in enumerate(zip(rows, scored)):
            begin = width - len(row) if left else 0
            ids[i, begin : begin + len(row)] = torch.tensor(row)
            live[i, begin : begin + len(row)] = 1
            mask[i, begin + len(row) - n : begin + len(row)] = torch.rand(n) < 0.8
        return cls(ids, live, mask, torch.randn(2, len(rows), width, dtype=torch.float64))

    def pack(self, **options):
        return pack(self.input_ids, self.attention_mask, self.completion_mask, **options)


def batch(left: bool = True) -> Batch:
    """Two prompts; completions that branch again, are equal, of one token, empty, and of a row by itself."""
    torch.manual_seed(1)

    def words(n: int) -> list[int]:
        return torch.randint(2, SMALL["vocab_size"], (n,)).tolist()

    first, second, turn = words(11), words(4), words(6)
    completions = [turn + words(3), turn + words(7), turn, words(9), words(1), []]
    rows = [first + x for x in completions] + [second + words(8), second + words(2), words(5)]
    rows.append(rows[1])
    scored = [len(x) for x in completions] + [8, 2, 4, len(completions[1])]
    order = torch.randperm(len(rows)).tolist()
    return Batch.of([rows[i] for i in order], [scored[i] for i in order], left)


def padded(model, batch: Batch, temperature: float, aux_loss: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logprob, entropy, aux_loss) as stock trainers compute them.

    They leave out the positions. Given, rotary angles, which transformers rounds to fp32, do not hang on the padding.
    """
    router = {"output_router_logits": True} if aux_loss else {}
    live = batch.attention_mask
    positions = (live.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=batch.input_ids, attention_mask=live, position_ids=positions, use_cache=False, **router)
    rows = statistics(out.logits, batch, temperature)
    if not aux_loss:
        return *rows, None
    experts = model.config.num_experts, model.config.num_experts_per_tok
    return *rows, load_balancing_loss_func(out.router_logits, *experts, live)


def alone(model, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, None]:
    """The same, row by row: for eager attention, which in fp64 makes NaN of padding."""
    rows = []
    for ids, live in zip(batch.input_ids, batch.attention_mask.bool()):
        logits = model(input_ids=ids[live][None], use_cache=False).logits[0]
        rows.append(logits.new_zeros(len(ids), logits.shape[1]).index_put((live.nonzero()[:, 0],), logits))
    return *statistics(torch.stack(rows), batch, temperature), None


def statistics(logits: Tensor, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    z = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logp = z.log_softmax(-1)
    scored = batch.completion_mask[:, 1:].bool()
    rows = logp.gather(-1, batch.input_ids[:, 1:, None])[..., 0], -(logp.exp() * logp).sum(-1)
    logprob, entropy = (torch.nn.functional.pad(x.where(scored, 0.0), (1, 0)) for x in rows)
    return logprob, entropy


def packed(model, batch: Batch, temperature: float, aux_loss: bool = False, **options):
    tree = batch.pack(min_saved=1, prune=not aux_loss)
    stats, loss = forward(model, tree, temperature=temperature, aux_loss=aux_loss, **options)
    return stats.logprob, stats.entropy, loss


def loss_of(batch: Batch, results) -> Tensor:
    """Random weights on log-probs, entropies and the auxiliary loss."""
    logprob, entropy, aux_loss = results
    upstream = batch.upstream.to(logprob.dtype)
    loss = (logprob * upstream[0]).sum() + (entropy * upstream[1]).sum()
    return loss if aux_loss is None else loss + 3 * aux_loss


def backward(model, batch: Batch, results) -> dict[str, Tensor]:
    """The gradient of every parameter by `loss_of`."""
    loss_of(batch, results).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return gradients
