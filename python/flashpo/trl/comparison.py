"""One micro-batch of distillation: states of student and teacher at the completion tokens, and their divergence."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashpo._causal_lm import CausalLM, Unsupported
from flashpo.ops.linear_divergence import linear_divergence
from flashpo.packing.head import gathering, parameters
from flashpo.packing.inputs import run
from flashpo.packing.tree import TokenTree
from flashpo.trl.packed import Batch
from flashpo.trl.patch import DEVICES, DTYPES

OUTPUTS = ("entropy", "student_logprob", "teacher_logprob", "is_top1_agreed")


class States(NamedTuple):
    """The hidden states that predict the completion tokens (B, C)."""

    hidden: Tensor  # (M, H), one for each pair of the tree; (B, C, H) without a tree
    tree: TokenTree | None

    @classmethod
    def on(cls, tree: TokenTree, model: Any) -> "States":
        """Compute them by one forward of the model's backbone, which must take trees."""
        backbone = CausalLM.of(model).backbone
        hidden = run(tree, backbone).last_hidden_state.squeeze(0)
        return cls(hidden[tree.source.to(hidden.device)], tree)

    def as_rows(self) -> Tensor:
        """(B, C, H)"""
        return self.hidden if self.tree is None else self.tree.unpack(self.hidden)

    def at(self, places: Tensor) -> Tensor:
        """(len(places), H): the states at these places, which count the completion tokens row by row."""
        if self.tree is None:
            return self.hidden.flatten(0, 1)[places.to(self.hidden.device)]
        pair = self.tree.pair.flatten()
        return self.hidden[pair[places.to(pair.device)].to(self.hidden.device)]


def why_not_comparable(models: list[Any]) -> str:
    """Why `linear_divergence` cannot take the heads of these models; empty if it can."""
    for model in models:
        try:
            head = CausalLM.of(model).head
        except Unsupported as error:
            return str(error)
        if head.weight.device.type not in DEVICES or head.weight.dtype not in DTYPES:
            return f"a head is {head.weight.dtype} on {head.weight.device.type}"
    return ""


class Comparison:
    """The comparison of a student and one teacher. `loss` takes the place of TRL's `_chunked_divergence_loss`.

    Args:
        models: student and teacher.
        completion_ids: (B, C).
        scored: (B, C), the completion tokens at which the two are compared.
        of_all: (B, C), the tokens at which the student is compared with any teacher; `scored` if there is one teacher.
        student: the student's states at `of_all`, if an earlier comparison with another teacher computed them.
        batch: the rows as models take them on trees; None if something of them runs padded.
    """

    def __init__(
        self,
        models: tuple[Any, Any],
        completion_ids: Tensor,
        scored: Tensor,
        of_all: Tensor,
        student: States | None = None,
        batch: Batch | None = None,
    ):
        self.models, self.completion_ids, self.scored, self.of_all = models, completion_ids, scored, of_all
        self.student, self.batch = student, batch
        self.teacher: States | None = None
        self.asked = False  # whether TRL has asked for the student's states
        self.sums = scored.new_zeros(4)  # (agreement, log-ratio, divergence, tokens)

    def loss(
        self,
        student_hidden_states: Tensor,
        teacher_hidden_states: Tensor,
        student_lm_head_weight: Tensor,  # not used: if the heads are sharded, they are gathered and read below
        teacher_lm_head_weight: Tensor,
        completion_mask: Tensor,
        beta: float,
        num_items_in_batch: Tensor | int | None = None,
        student_lm_head_bias: Tensor | None = None,
        teacher_lm_head_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_final_logit_softcapping: float | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, sum of the student's entropies, number of tokens)"""
        student, teacher = (
            States(hidden, None if states is None else states.tree)
            for hidden, states in ((student_hidden_states, self.student), (teacher_hidden_states, self.teacher))
        )
        hidden, target, copies = self._rows(student, teacher, completion_mask.to(student.hidden.device))
        with self._whole_heads():
            heads = [parameters(CausalLM.of(model).head) for model in self.models]
            stats = linear_divergence(
                hidden[0],
                heads[0][0],
                hidden[1],
                heads[1][0],
                target,
                heads[0][1],
                heads[1][1],
                beta=beta,
                temperature=temperature,
                student_logit_scale=student_logit_scale,
                teacher_logit_scale=teacher_logit_scale,
                student_softcap=student_final_logit_softcapping,
                teacher_softcap=teacher_final_logit_softcapping,
                outputs=OUTPUTS,
                gather=self._whole_heads,
            )
        divergence, entropy = (stats.divergence * copies).sum(), (stats.entropy * copies).sum()
        tokens = copies.sum()
        log_ratio = (stats.student_logprob - stats.teacher_logprob).detach()
        agreed = (stats.is_top1_agreed * copies).sum()
        self.sums = torch.stack([agreed.float(), (log_ratio * copies).sum(), divergence.detach(), tokens.float()])
        items = tokens.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return divergence / (items.to(divergence.device) if isinstance(items, Tensor) else items), entropy, tokens

    def _rows(self, student: States, teacher: States, scored: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """The hidden states of both at the tokens to compare, these tokens, and how many tokens of the batch each of
        them represents.

        If both ran the same tree, equal tokens with the same context are compared once.
        """
        if student.tree is not None and student.tree is teacher.tree:
            target = student.tree.target
            copies = student.tree.pair.flatten().bincount(minlength=len(target) + 1)[: len(target)]
            return (student.hidden, teacher.hidden), target.to(scored.device), copies.to(scored.device)
        places = scored.flatten().nonzero()[:, 0]
        target = self.completion_ids.to(scored.device).flatten()[places]
        return (student.at(places), teacher.at(places)), target, torch.ones_like(target)

    @contextlib.contextmanager
    def _whole_heads(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for gather in map(gathering, (CausalLM.of(model).head for model in self.models)):
                if gather is not None:
                    stack.enter_context(gather())
            yield
