"""A few short rows, scored as padded rows and as a token tree by a model that is afterwards as it was."""

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

LONGEST = 24  # tokens: more than the windows of a small twin
EVERY = 2  # tokens of the longest row another one leaves it, after which it has as many of its own
COPIED = 1 << 20  # numbers; a larger buffer holds weights (of quantised layers), which no forward changes


class Scored(NamedTuple):
    values: Tensor  # of all scored tokens: log-probs, or a projection of the hidden states of a model without a head
    gradients: list[Tensor]  # of the parameters asked for, else of the embeddings, summed over the places of a token


class Trial:
    """A causal language model, or a backbone (`head=False`), and its ways to score the rows.

    Every rank of a sharded model has to run them, and these have no gradients: its hooks reduce what backward brings.
    Nor has a model whose weights were made in inference mode.
    """

    def __init__(self, model: nn.Module, head: bool = True, parameters: bool = False):
        self.head = head
        backbone: Any = CausalLM.of(model).backbone if head else model
        self.backbone = backbone
        self.beside: list[Tensor] = []  # what the rows have beside tokens that has gradients to compare
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad] if parameters else []
        # Autograd saves no weights that were made in inference mode
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
        """Token ids, mask, and what is scored, all (rows, tokens), padded on the right."""
        return _rows_of_text(config)

    def _beside(self, rows: slice, ids: Tensor) -> dict[str, Any]:
        """What the model takes beside the ids of these rows."""
        return {}

    def _of_distinct(self, gradient: Tensor) -> Tensor:
        """Of what is beside the tokens: summed over what is the same in several rows."""
        return gradient

    def _pack(self, ids: Tensor, live: Tensor, scored: Tensor) -> TokenTree:
        return pack(ids, live, scored, min_saved=1)

    def padded(self) -> Scored:
        return self._score(lambda: self._plain(slice(None)))

    def apart(self) -> Scored:
        """In two batches: products of other shapes round otherwise."""

        def run() -> Tensor:
            values = []
            for rows in (slice(0, None, 2), slice(1, None, 2)):
                width = int(self.live[rows].sum(1).max())
                values.append(pad(self._plain(rows, width), (0, self.ids.shape[1] - width)))
            order = torch.arange(len(self.ids), device="cpu")
            return torch.cat(values)[torch.cat([order[0::2], order[1::2]]).argsort()]

        return self._score(run)

    def nudged(self, eps: float) -> Scored:
        """The padded batch with embeddings that are off by a rounding each."""
        generator = torch.Generator().manual_seed(2)

        def nudge(x: Tensor) -> Tensor:
            sign = torch.randint(2, x.shape, generator=generator, device="cpu").to(x.device) * 2 - 1
            return (x * (1 + eps * sign)).to(x.dtype)

        return self._score(lambda: self._plain(slice(None)), nudge)

    def packed(self) -> Scored:
        return self._score(lambda: self._on_tree(self.ids, self.live, self.scored))

    def packed_by_segments(self) -> Scored:
        """As the model trains where its attention has dropout, but without the dropout."""
        with without_kernel():
            return self.packed()

    @torch.no_grad()
    def has_dropout(self) -> bool:
        """Whether attention has dropout in train mode."""
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
        """Of the next tokens that are `scored` (rows, tokens - 1)."""
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
            return leaf.clone()  # some models scale it in place

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
        """(distinct tokens, H), the same for a batch and its tree."""
        distinct = self.ids.unique()
        total = gradients[0].new_zeros(len(distinct), gradients[0].shape[-1], dtype=torch.float64)
        for (ids, _), gradient in zip(embedded, gradients):
            index = torch.searchsorted(distinct, ids.to(distinct.device).flatten()).to(total.device)
            total.index_add_(0, index, gradient.flatten(0, -2).double())
        return total


def _rows_of_text(config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask, and what is scored: every distinct token once. All (rows, tokens), padded on the right.

    The tree branches so often that half of its tokens do not lie behind the one before them. None is the padding token,
    whose embedding of zeros makes norms divide by next to nothing.
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
    return sharding.why_no_view(model) is not None or any(sharding.is_dtensor(p) for p in model.parameters())


def _wraps(module: nn.Module) -> bool:
    """DDP and FSDP1 keep account of their forwards in attributes, which stay; FSDP2 only changes a module's class."""
    return isinstance(module, nn.parallel.DistributedDataParallel) or sharding.wraps_in_fsdp1(module)


@contextlib.contextmanager
def on_trial(model: nn.Module, head: bool = True) -> Iterator[None]:
    """Within it the model takes trees, in eval mode and uncompiled; afterwards it is as before, whatever it ran."""
    training = [(m, m.training) for m in model.modules()]
    modules = [m for m in model.modules() if not _wraps(m)]
    # a rotary embedding counts its longest row in a number, then in a tensor
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
                if "_flashpo_kind" in vars(module):  # put back with `before`
                    del vars(module)["forward"]
                if getattr(module, "gradient_checkpointing", False):
                    module.gradient_checkpointing = False  # type: ignore[assignment]
            accept_trees(model, head)
            yield
        finally:
            for module, kept in zip(modules, before):
                kept |= {HOOKED: True} if vars(module).get(HOOKED) else {}  # so are the hooks, which must not double
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
            CALLS.clear()  # calls that other threads made meanwhile are not counted
            CALLS.update(calls)
            if is_sharded(model):
                sharding.reshard(model)


OURS = ("forward", "_flashpo_norm")


def is_plain(x: Any) -> bool:
    return x is None or isinstance(x, bool | int | float | str)
