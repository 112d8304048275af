"""A token tree against rows run one by one, on the model itself: what no configuration can promise."""

import torch
from torch import nn

from flashpo._causal_lm import CausalLM
from flashpo.packing.scoring import score
from flashpo.packing.tree import pack


@torch.no_grad()
def worst_difference(model: nn.Module, tokens: int = 12) -> float:
    """The largest difference, in nats, between log-probs by `score` and by the model's own forward of each row.

    Three rows of up to `tokens` tokens, which branch twice: a fraction of a training step. Every rank of a sharded
    model has to call it.
    """
    lm = CausalLM.of(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.base.config.get_text_config().vocab_size, (3, tokens), generator=generator, device="cpu")
    ids[1, : tokens // 2], ids[2, : tokens // 4] = ids[0, : tokens // 2], ids[0, : tokens // 4]
    ids = ids.to(next(lm.base.parameters()).device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        everything = torch.ones_like(ids)
        packed = score(model, pack(ids, everything, everything[:, 1:], min_saved=1)).logprob
        logits = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in ids])[:, :-1]
    finally:
        for module in training:
            module.training = True
    alone = logits.to(packed.dtype).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return float((packed - alone).abs().max())
