"""Which PEFT adapters work with the rollout engine, with token trees and with our LM head; for `flashpo.bench.models`.

Every adapter type of the installed PEFT, and every option that changes what LoRA computes, is put on a small model with
random adapter weights, so that no adapter is the identity. Rollouts, token trees, and TRL's fused head on our operator
are compared with `PeftModel.forward` and its gradients.
"""

import contextlib
import copy
import io
import tempfile
from typing import Any, NamedTuple

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from flashpo._causal_lm import CausalLM
from flashpo._hosts.peft import is_tuner_layer
from flashpo.bench.tiny_models import tiny_model
from flashpo.packing import pack, packable, score
from flashpo.rollout import RolloutEngine, SamplingParams, support
from flashpo.trl.patch import patched

VOCABULARY = 97
LAYERS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
TOKENS = list(range(0, VOCABULARY, 3))
INVOCATION = [5, 6]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PROMPT = {"num_virtual_tokens": 3}
# What a type takes instead of `target_modules`, or in addition: sizes that fit into a small model.
TYPES: dict[str, dict[str, Any]] = {
    "MULTITASK_PROMPT_TUNING": PROMPT | {"num_tasks": 2},
    "P_TUNING": PROMPT | {"encoder_hidden_size": 8},
    "CPT": {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2, "target_modules": None},
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 64},
    "FROD": {"target_modules": ["q_proj"]},
    "LN_TUNING": {"target_modules": NORMS},
    "MISS": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHADOW": {"r": 4, "target_modules": None},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": TOKENS, "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 64},
}
LORA: dict[str, dict[str, Any]] = {
    "alora_invocation_tokens": {"alora_invocation_tokens": INVOCATION},
    "bias": {"bias": "all"},
    "fan_in_fan_out": {"family": "gpt2", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "init_lora_weights=gaussian": {"init_lora_weights": "gaussian"},
    "init_lora_weights=olora": {"init_lora_weights": "olora"},
    "init_lora_weights=orthogonal": {"init_lora_weights": "orthogonal"},
    "init_lora_weights=pissa": {"init_lora_weights": "pissa"},
    "kasa_config": {"kasa_config": KasaConfig()},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "layers_to_transform": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "modules_to_save, norms": {"modules_to_save": NORMS},
    "monteclora_config": {"monteclora_config": MontecloraConfig()},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}},
    "target_modules=embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "target_modules=embed_tokens, tied": {"target_modules": ["q_proj", "embed_tokens"], "tied": True},
    "target_modules=lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "target_parameters": {"family": "qwen3_moe", "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "trainable_token_indices": {"trainable_token_indices": TOKENS},
    "trainable_token_indices, tied": {"trainable_token_indices": TOKENS, "tied": True},
    "use_bdlora": {
        "target_modules": ["q_proj", "o_proj"],
        "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["o_proj"], nblocks=2),
    },
    "use_dora": {"use_dora": True},
    "use_rslora": {"use_rslora": True},
    "velora_config": {"velora_config": {"num_groups": 4}},
}
NAMES = tuple(sorted([kind.value for kind in PeftType] + [f"LORA, {option}" for option in LORA]))
ROUNDING = 1e-4  # of log-probs in nats and, relatively, of gradients; a larger error means another computation


class Row(NamedTuple):
    """The results of one adapter: "yes" or the reason against it, for rollouts, token trees and the fused head."""

    adapter: str
    rollout: str
    packed: str
    head: str


class Untried(Exception):
    """There is nothing with which to compare; the message says why."""


def try_adapter(name: str) -> Row:
    """Try one adapter. Raises Untried if it cannot be built or its own forward does not run. Raises AssertionError if
    it changes nothing, because then the comparison would show nothing."""
    model = make(name)
    try:
        expected = _results(model, _alone(model))
    except Exception as error:
        raise Untried(f"its own forward raises {type(error).__name__}: {error}") from error
    with model.disable_adapter(), torch.no_grad():
        change = float((_alone(model) - expected[0]).abs().max())
    assert change > 0.1, f"{name} changes log-probs by {change:.1e} only"
    return Row(name, _rolled(model), _packed(model, expected), _head(model, expected))


def make(name: str) -> PeftModel:
    """A small model with the adapter, whose weights are random."""
    kind, _, option = name.partition(", ")
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    usual: dict[str, Any] = PROMPT if issubclass(config, PromptLearningConfig) else {"target_modules": LAYERS}
    options = usual | (LORA[option] if option else TYPES.get(kind, {}))
    size: dict[str, Any] = {"tie_word_embeddings": options.pop("tied", False), "num_hidden_layers": 2}
    family = options.pop("family", "llama")
    size |= {"attn_pdrop": 0.0} if family == "gpt2" else {}  # GPT-2's published dropout would rule out token trees
    model = tiny_model(family, **size)
    torch.manual_seed(0)
    with contextlib.redirect_stderr(io.StringIO()):  # some show progress
        try:
            adapted = _wrapped(model, kind, config, options)
        except Exception as error:
            raise Untried(f"not built: {type(error).__name__}: {error}") from error
    randomise(adapted)
    return adapted.eval()


def _wrapped(model: Any, kind: str, config: type[PeftConfig], options: dict[str, Any]) -> PeftModel:
    if kind != "XLORA":
        return peft.get_peft_model(model, config(task_type="CAUSAL_LM", **options))
    with tempfile.TemporaryDirectory() as folder:  # this type mixes adapters that are on disk
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=LAYERS, init_lora_weights=False)
        peft.get_peft_model(copy.deepcopy(model), lora).save_pretrained(folder)
        model.config.use_cache = False
        mixture = config(task_type="CAUSAL_LM", hidden_size=32, adapters={"0": folder, "1": folder})
        return peft.get_peft_model(model, mixture)


def randomise(model: Any) -> None:
    """Add noise to all trainable parameters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def rows() -> Tensor:
    """Three rows that branch twice; two of them contain the tokens that invoke an activated LoRA."""
    ids = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[0, 4:6] = torch.tensor(INVOCATION)
    ids[1, :6], ids[2, :3] = ids[0, :6], ids[0, :3]
    return ids


Results = tuple[Tensor, dict[str, Tensor]]


def _results(model: Any, logprob: Tensor) -> Results:
    """Log-probs (3, 11), and every gradient of their sum with random weights."""
    weights = torch.randn(logprob.shape, generator=torch.Generator().manual_seed(2))
    (logprob * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logprob.detach(), gradients


def _of_logits(logits: Tensor, ids: Tensor) -> Tensor:
    return logits[:, -ids.shape[1] : -1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


def _alone(model: Any) -> Tensor:
    """The results of the model's own forward, row by row."""
    ids = rows()
    return torch.cat([_of_logits(model(input_ids=row[None], use_cache=False).logits, row[None]) for row in ids])


def _compared(found: Results, expected: Results) -> str:
    nats = float((found[0] - expected[0]).abs().max())
    if nats > ROUNDING:
        return f"differs by {nats:.1e} nats"
    if found[1].keys() != expected[1].keys():
        return f"{len(found[1])} gradients of {len(expected[1])}"
    size = max(float(x.abs().max()) for x in expected[1].values())
    error = max(float((x - found[1][name]).abs().max()) for name, x in expected[1].items()) / size
    return "yes" if error < ROUNDING else f"gradients differ by {error:.1e}"


def _rolled(model: Any) -> str:
    answer = support(model)
    if not answer.ok:
        return answer.reason
    engine = RolloutEngine(model, fallback="error", check=False)
    sampled = engine.generate([row[:8].tolist() for row in rows()], SamplingParams(n=2, max_new_tokens=5))
    error = 0.0
    for prompt, completion, logprobs in zip(sampled.prompt_ids, sampled.completion_ids, sampled.logprobs):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            plain = _of_logits(model(input_ids=ids, use_cache=False).logits, ids)[0, -len(completion) :]
        error = max(error, float((plain - torch.tensor(logprobs)).abs().max()))
    return "yes" if error < ROUNDING else f"differs by {error:.1e} nats"


def _packed(model: Any, expected: Results) -> str:
    answer = packable(model)
    if not answer.ok:
        return answer.reason.split(": ", 1)[-1]
    everything = torch.ones_like(rows())
    tree = pack(rows(), everything, everything[:, 1:], min_saved=1)
    return _compared(_results(model, score(model, tree).logprob), expected)


def _head(model: Any, expected: Results) -> str:
    """The results of the fused head, called on padded rows as SFT, DPO and KTO do."""
    if is_tuner_layer(CausalLM.of(model).head):
        return "TRL refuses an adapter on the head"
    ids = rows()
    add_fused_lm_head(CausalLM.of(model).base)
    try:
        stock = _fused(model, ids)
    except Exception as error:
        return f"TRL's own raises {type(error).__name__}: {error}"
    with patched():
        ours = _fused(model, ids)
    return _compared(ours, stock)


def _fused(model: Any, ids: Tensor) -> Results:
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
    return _results(model, out.log_probs[:, -ids.shape[1] + 1 :])
