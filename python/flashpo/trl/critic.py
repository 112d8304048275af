"""A critic inside the policy's module: one forward of the wrapped module gives both log-probs and values.

V_t = w . h_{t-1} + b      h: hidden states of the policy's backbone (shared), or of a separate backbone of the critic

The critic is a part of the policy's module so that DDP and FSDP reduce its gradients and the optimizer sees its
parameters. Checkpoints keep the two apart: `from_pretrained` can load the policy, and the critic is saved as
`critic.safetensors` in the same folder.
"""

import contextlib
import dataclasses
import functools
import os
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashpo.ops.token_stats import TokenStats
from flashpo.packing import TokenTree
from flashpo.packing.inputs import run

NAME = "critic"  # the policy's attribute that holds the critic
FILE = "critic.safetensors"
BACKBONE_INPUTS = ("input_ids", "attention_mask", "position_ids")


@functools.cache
def with_values(output: type) -> type:
    """A model's output class with one more field, `state_values` (batch, seq_len - 1), fp32: the value of the state
    before each label."""
    return dataclasses.make_dataclass("ActorCriticOutput", [("state_values", Tensor | None, None)], bases=(output,))


class ActorCriticScores(NamedTuple):
    """TreeScores with `state_values` (rows, scored tokens), fp32; 0 at places that are not scored."""

    stats: TokenStats
    aux_loss: Tensor | None
    state_values: Tensor


class Critic(nn.Module):
    """A linear head, initialised to V = 0. It computes in fp32 whatever the backbone's dtype."""

    def __init__(self, hidden_size: int, device: torch.device, backbone: PreTrainedModel | None = None):
        super().__init__()
        self.head = nn.Linear(hidden_size, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.backbone = backbone
        self.is_asked = False

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Within the block, forwards of the policy on padded rows give values, too; those on trees always do."""
        before, self.is_asked = self.is_asked, True
        try:
            yield
        finally:
            self.is_asked = before

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.device, torch.float32)).squeeze(-1)


def attach_critic(policy: PreTrainedModel, backbone: PreTrainedModel | None = None) -> Critic:
    """Give `policy` a critic: its forward returns values, too.

    Call it after TRL's `add_fused_lm_head`, if that is used: the new forward calls the one that the policy has now.

    Args:
        backbone: a separate model without a head, from whose hidden states the critic computes values; None: it uses
            those of the policy.
    """
    device = policy.get_output_embeddings().weight.device
    config = (policy if backbone is None else backbone).config.get_text_config()
    critic = Critic(config.hidden_size, device, backbone if backbone is None else backbone.to(device))
    setattr(policy, NAME, critic)
    score = policy.forward

    @functools.wraps(type(policy).forward)  # `generate` reads the signature
    def forward(self, *args, flashpo_tree: TokenTree | None = None, **kwargs):
        if flashpo_tree is not None:
            kwargs["flashpo_tree"] = flashpo_tree
        elif not critic.is_asked:
            return score(*args, **kwargs)
        seen: list[Tensor] = []
        watched = self.base_model if critic.backbone is None else critic.backbone
        hook = watched.register_forward_hook(lambda module, inputs, out: seen.append(out.last_hidden_state))
        try:
            out = score(*args, **kwargs)
            if critic.backbone is not None:
                if flashpo_tree is None:
                    critic.backbone(**_text_inputs(args, kwargs), use_cache=False)
                else:
                    run(flashpo_tree, critic.backbone)
        finally:
            hook.remove()
        (hidden,) = seen
        if flashpo_tree is None:
            kind: Any = type(out)
            return with_values(kind)(**out, state_values=critic(hidden[:, :-1]))
        values = flashpo_tree.unpack(critic(hidden[0, flashpo_tree.source]))
        return ActorCriticScores(out.stats, out.aux_loss, values)

    forward.takes_trees = getattr(score.__func__, "takes_trees", False)  # type: ignore[attr-defined]
    policy.forward = types.MethodType(forward, policy)  # type: ignore[method-assign]
    return critic


def _text_inputs(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    if args or "input_ids" not in kwargs or "pixel_values" in kwargs:
        raise NotImplementedError("a critic with a backbone of its own reads token ids: text, no prompt learning")
    return {name: kwargs[name] for name in BACKBONE_INPUTS if kwargs.get(name) is not None}


def split_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a state dict of the wrapped or unwrapped policy into (entries of the policy, entries of the critic)."""
    policy, critic = {}, {}
    for name, value in state.items():
        parts = f".{name}".split(f".{NAME}.", 1)
        if len(parts) == 2:
            critic[parts[1]] = value
        else:
            policy[name] = value
    return policy, critic


def save_critic(state: dict[str, Tensor], folder: str) -> None:
    """Write a critic's state dict into `folder`."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    safetensors.torch.save_file(tensors, os.path.join(folder, FILE), metadata={"format": "pt"})


def load_critic(critic: Critic, folder: str) -> None:
    path = os.path.join(folder, FILE)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is missing: {folder} was not saved by PPOTrainer")
    critic.load_state_dict(safetensors.torch.load_file(path))
