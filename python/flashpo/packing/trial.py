"""`Trial`: scores a few short rows as padded rows and as a token tree. `on_trial` restores the model afterwards."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from flashpo._causal_lm import CausalLM
from flashpo._hosts import sharding
from flashpo._hosts.transformers import ATTENTION, HOOKED
from flashpo._op import CALLS
from flashpo._precision import exact_products
from flashpo.packing.attention import without_kernel
from flashpo.packing.inputs import run
from flashpo.packing.scoring import accept_trees
from flashpo.packing.tree import TokenTree, pack

LONGEST = 24  # tokens of the longest row: more than the windows of a small twin
EVERY = 2  # after every 2 tokens another row leaves the longest one, and has 2 tokens of its own
COPIED = 1 << 20  # larger buffers are not copied: they hold weights of quantised layers, which no forward changes


class Scored(NamedTuple):
    """The results of one way to score the rows."""

    values: Tensor  # for all scored tokens: log-probs, or projections of hidden states if the model has no head
    gradients: list[Tensor]  # of the parameters if asked for, otherwise of the embedding of each distinct token id


class Trial:
    """A causal language model, or a backbone (`head=False`), with methods that score the rows in different ways.

    All ranks of a sharded model have to run these methods. There are no gradients for a sharded model, because its
    hooks would reduce them, nor for a model whose weights were made in inference mode.

    parameters: compare the gradients of the parameters instead of those of the embeddings.
    """

    def __init__(self, model: nn.Module, head: bool = True, parameters: bool = False):
        self.head = head
        backbone: Any = CausalLM.of(model).backbone if head else model
        self.backbone = backbone
        self.beside: list[Tensor] = []  # inputs other than token ids whose gradients are compared, too
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad] if parameters else []
        # Autograd cannot save weights that were made in inference mode
        self.differentiable = not is_sharded(model) and not any(p.is_inference() for p in model.parameters())
        self.model = sharding.inside_engine(model) if self.differentiable else model
        self.embedding: nn.Module = backbone.get_input_embeddings()
        config = backbone.config.get_text_config()
        device = next(self.embedding.parameters()).device
        self.ids, self.live, scored = (x.to(device) for x in self._rows(config))
        self.scored = scored[:, 1:].bool()
        generator = torch.Generator().manual_seed(1)
        options: Any = dict(generator=generator, device="cpu", dtype=torch.float64)
        self.upstream = torch.randn(self.scored.shape, **options).to(device)
        self.direction = torch.randn(config.hidden_size, **options).to(device)

    def _rows(self, config: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, attention mask and mask of the scored tokens, all (rows, tokens), padded on the right."""
        return _rows_of_text(config)

    def _beside(self, rows: slice, ids: Tensor) -> dict[str, Any]:
        """The inputs of the model in addition to the ids of these rows."""
        return {}

    def _of_distinct(self, gradient: Tensor) -> Tensor:
        """A gradient of `beside`, summed over rows in which this input is the same."""
        return gradient

    def _pack(self, ids: Tensor, live: Tensor, scored: Tensor) -> TokenTree:
        return pack(ids, live, scored, min_saved=1)

    def padded(self) -> Scored:
        return self._score(lambda: self._plain(slice(None)))

    def apart(self) -> Scored:
        """The rows in two batches: matrix products of other shapes round differently."""

        def run() -> Tensor:
            values = []
            for rows in (slice(0, None, 2), slice(1, None, 2)):
                width = int(self.live[rows].sum(1).max())
                values.append(pad(self._plain(rows, width), (0, self.ids.shape[1] - width)))
            order = torch.arange(len(self.ids), device="cpu")
            return torch.cat(values)[torch.cat([order[0::2], order[1::2]]).argsort()]

        return self._score(run)

    def nudged(self, eps: float) -> Scored:
        """The padded batch with each number of the embeddings changed by one rounding."""
        generator = torch.Generator().manual_seed(2)

        def nudge(x: Tensor) -> Tensor:
            sign = torch.randint(2, x.shape, generator=generator, device="cpu").to(x.device) * 2 - 1
            return (x * (1 + eps * sign)).to(x.dtype)

        return self._score(lambda: self._plain(slice(None)), nudge)

    def packed(self) -> Scored:
        return self._score(lambda: self._on_tree(self.ids, self.live, self.scored))

    def packed_by_segments(self) -> Scored:
        """The tree in the way in which a model with dropout in its attention trains, but without the dropout."""
        with without_kernel():
            return self.packed()

    @torch.no_grad()
    def has_dropout(self) -> bool:
        """Whether the model's attention has dropout in train mode."""
        before = [(module, module.training) for module in self.model.modules()]
        try:
            for module, _ in before:
                module.training = True
            with without_kernel() as found:
                self._on_tree(self.ids, self.live, self.scored)
        finally:
            for module, training in before:
                module.training = training
        return bool(found)

    def _plain(self, rows: slice, width: int | None = None) -> Tensor:
        ids, live = self.ids[rows, :width], self.live[rows, :width]
        out = self.model(input_ids=ids, attention_mask=live, use_cache=False, **self._beside(rows, ids))
        if not self.head:
            return self._projected(out.last_hidden_state[:, :-1])
        return out.logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None].to(out.logits.device))[..., 0]

    def _on_tree(self, ids: Tensor, live: Tensor, scored: Tensor) -> Tensor:
        """Values by a token tree, (rows, tokens - 1). `scored`: (rows, tokens - 1), which next tokens are scored."""
        tree = self._pack(ids, live, pad(scored, (1, 0)))
        if self.head:
            return self.model(flashpo_tree=tree, outputs=()).stats.logprob[:, 1:].double()
        out = run(tree, self.model)
        return tree.unpack(self._projected(out.last_hidden_state[0, tree.source]))[:, 1:]

    def _projected(self, hidden: Tensor) -> Tensor:
        return hidden.double() @ self.direction.to(hidden.device)

    def _score(self, run: Callable[[], Tensor], nudge: Callable[[Tensor], Tensor] = lambda x: x) -> Scored:
        embedded: list[tuple[Tensor, Tensor]] = []

        def start_here(module: nn.Module, inputs: tuple, out: Tensor) -> Tensor:
            if not self.differentiable or self.parameters:
                return nudge(out)
            leaf = nudge(out.detach()).requires_grad_()
            embedded.append((inputs[0], leaf))
            return leaf.clone()  # because some models scale the embeddings in place

        handle = self.embedding.register_forward_hook(start_here)
        try:
            with torch.set_grad_enabled(self.differentiable):
                values = run()
                scored = values[self.scored.to(values.device)]
                if not self.differentiable:
                    return Scored(scored, [])
                wanted = self.parameters or [*(leaf for _, leaf in embedded), *self.beside]
                loss = (scored * self.upstream[self.scored].to(values.device)).sum()
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        finally:
            handle.remove()
        if self.parameters:
            found = list(gradients)
        else:
            found = [self._of_tokens(embedded, gradients), *map(self._of_distinct, gradients[len(embedded) :])]
        return Scored(scored.detach(), [x.double() for x in found])

    def _of_tokens(self, embedded: list[tuple[Tensor, Tensor]], gradients: tuple[Tensor, ...]) -> Tensor:
        """Gradients summed by token id, (distinct ids, H), so that those of a batch and of its tree can be compared."""
        distinct = self.ids.unique()
        total = gradients[0].new_zeros(len(distinct), gradients[0].shape[-1], dtype=torch.float64)
        for (ids, _), gradient in zip(embedded, gradients):
            index = torch.searchsorted(distinct, ids.to(distinct.device).flatten()).to(total.device)
            total.index_add_(0, index, gradient.flatten(0, -2).double())
        return total


def _rows_of_text(config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and mask of the scored tokens, all (rows, tokens), padded on the right.

    Each distinct token is scored once. The tree branches so often that half of its tokens do not follow the token
    before them in the flat order. No token is the padding token: its embedding is zero, and norms would divide by
    almost 0.
    """
    width = min(LONGEST, getattr(config, "max_position_embeddings", None) or LONGEST)
    shared = torch.tensor([0, *range(0, width - EVERY, EVERY)], device="cpu")[:, None]
    length, depth = shared + EVERY, torch.arange(width, device="cpu")
    length[0] = width
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (len(length), width), generator=generator, device="cpu")
    if (padding := getattr(config, "pad_token_id", None)) is not None:
        ids = ids.where(ids != padding, (ids + 1) % config.vocab_size)
    live = depth < length
    return ids[:1].where(depth < shared, ids), live.long(), (live & (depth >= shared.clamp(min=1))).long()


def is_sharded(model: nn.Module) -> bool:
    return bool(sharding.why_no_view(model)) or any(sharding.is_dtensor(p) for p in model.parameters())


def _wraps(module: nn.Module) -> bool:
    """Whether it is a wrapper of DDP or FSDP1. These record their forwards in attributes, which must not be restored.
    FSDP2 has no wrapper and only changes a module's class."""
    return isinstance(module, nn.parallel.DistributedDataParallel) or sharding.wraps_in_fsdp1(module)


@contextlib.contextmanager
def on_trial(model: nn.Module, head: bool = True) -> Iterator[None]:
    """Within the block the model takes trees, in eval mode and uncompiled. Afterwards it is as before, whatever ran."""
    training = [(m, m.training) for m in model.modules()]
    modules = [m for m in model.modules() if not _wraps(m)]
    # tensors, too: a rotary embedding records its longest row in a number, and later in a tensor
    before = [
        {k: x for k, x in vars(m).items() if k == "forward" or is_plain(x) or isinstance(x, Tensor)} for m in modules
    ]
    buffers = [
        (m, k, x, x.clone()) for m in modules for k, x in m._buffers.items() if x is not None and x.numel() <= COPIED
    ]
    configs = {id(c): c for c in (getattr(m, "config", None) for m in modules) if hasattr(c, ATTENTION)}
    attentions = [(config, getattr(config, ATTENTION)) for config in configs.values()]
    calls = CALLS.copy()
    gpus = range(torch.cuda.device_count()) if any(p.is_cuda for p in model.parameters()) else []
    with (
        exact_products(),
        torch.random.fork_rng(gpus),
        torch.compiler.set_stance("force_eager"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            for module, _ in training:
                module.training = False
            for module in modules:
                if "_flashpo_kind" in vars(module):  # a compiled layer; `before` restores its forward
                    del vars(module)["forward"]
                if getattr(module, "gradient_checkpointing", False):
                    module.gradient_checkpointing = False  # type: ignore[assignment]
            accept_trees(model, head)
            yield
        finally:
            for module, kept in zip(modules, before):
                # the hooks stay on the model, so that the flag must stay, too, or they would be installed twice
                kept |= {HOOKED: True} if vars(module).get(HOOKED) else {}
                for name in [k for k, x in vars(module).items() if k not in kept and (k in OURS or is_plain(x))]:
                    del vars(module)[name]
                vars(module).update(kept)
            for module, trained in training:
                module.training = trained
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    with torch.inference_mode(buffer.is_inference()):
                        buffer.copy_(value)
            for config, attention in attentions:
                setattr(config, ATTENTION, attention)
            CALLS.clear()  # this also drops the calls that other threads made in the meantime
            CALLS.update(calls)
            if is_sharded(model):
                sharding.reshard(model)


OURS = ("forward", "_flashpo_norm")


def is_plain(x: Any) -> bool:
    return x is None or isinstance(x, bool | int | float | str)
