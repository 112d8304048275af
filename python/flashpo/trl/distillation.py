"""DistillationTrainer: TRL's on-policy distillation on token trees, with both heads in one operator.

Generation, teacher, masks, normalisation and logs are TRL's. FlashPO takes over at two places in TRL's
`_compute_loss`: where it asks for the last hidden states of a model, and where it passes those of student and teacher
to its divergence.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer import distillation_trainer  # not trl's names: `flashpo run` replaces them

from flashpo._causal_lm import CausalLM
from flashpo._hosts.trl import COMPLETIONS, GROUPS, ROLLOUTS, TEACHERS, TREES, why_not
from flashpo.packing.scoring import accept_trees
from flashpo.trl import start
from flashpo.trl._fallback import Fallback
from flashpo.trl._replaced import replaced
from flashpo.trl._text_only import beside_text, padding_changes_nothing
from flashpo.trl.accelerated import in_place_of_trls, overridden
from flashpo.trl.comparison import Comparison, States, why_not_comparable
from flashpo.trl.config import EngineOptions, documented
from flashpo.trl.images import SCORING_INPUTS, TrainerImages
from flashpo.trl.packed import Batch, groups_stay_together, tokens_of
from flashpo.trl.patch import active, scores
from flashpo.trl.sampling import Sampling
from flashpo.trl.sharing import Sharing, why_not_packed
from flashpo.trl.teachers import Teachers, check_dataset, places

WHICH = "teacher_index"  # key of a batch: the index of each row's teacher, if there are several


@documented
@dataclass
class DistillationConfig(EngineOptions, trl.DistillationConfig):
    """Takes all arguments of `trl.DistillationConfig`, and those below."""

    _VALID_DICT_FIELDS = [*trl.DistillationConfig._VALID_DICT_FIELDS, "rollout_options"]  # noqa: RUF012

    num_generations: int = field(
        default=1,
        metadata={
            "help": "How many completions of each prompt a generation batch has. The batch keeps its number of rows, "
            "per_device_train_batch_size * processes * gradient_accumulation_steps, which must be a multiple of this."
        },
    )
    teacher_column: str = field(
        default="teacher",
        metadata={"help": "With several teachers: the column of the dataset that names the teacher of each row."},
    )

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.num_generations, int) or self.num_generations < 1:
            raise ValueError(f"num_generations must be an integer of at least 1, got {self.num_generations!r}")
        rows = self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps
        if rows % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations} must divide the {rows} rows of a generation batch: "
                f"per_device_train_batch_size={self.per_device_train_batch_size} * {self.world_size} processes * "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}"
            )


class DistillationTrainer(Sampling, distillation_trainer.DistillationTrainer):
    """TRL's DistillationTrainer with FlashPO's rollout engine, token trees and divergence.

    It takes the arguments of `trl.DistillationTrainer`. Several completions of a prompt and several teachers are
    additional options, see `flashpo.trl.DistillationConfig`.

    Args:
        teacher_model: as in TRL, or a dict from names to such teachers. With a dict, a column of the dataset
            (`teacher_column`) names the teacher of each row, and only this teacher runs the row. The loss is the mean
            over all tokens, as with one teacher.

    Raises:
        ValueError: several teachers or completions are asked for and the installed TRL does not allow it, a teacher's
            vocabulary has another size than the student's, or the dataset does not name a teacher for each row.
    """

    _trl_class = distillation_trainer.DistillationTrainer
    teacher_model: Any
    _signature_columns: Any
    _comparison: Comparison | None = None  # of the `_compute_loss` that runs now; None if TRL compares
    _tried = False

    def __init__(self, model, teacher_model=None, *args, **kwargs):
        given = Teachers(teacher_model)
        lacks = why_not(self._trl_class, TEACHERS) or why_not(self._trl_class, TREES)
        if lacks and len(given.given) > 1:
            raise ValueError(f"teacher_model must be one model with this TRL, not a dict of several: {lacks}")
        with given.constructing(self._trl_class) as first:
            super().__init__(model, first, *args, **kwargs)
        self.teachers: dict[str, Any] = given.prepared(self)
        if len(self.teachers) > 1:
            for what in ("train_dataset", "eval_dataset"):
                check_dataset(what, getattr(self, what), self._column, list(self.teachers))
        self._say_what_trl_lacks()
        if self._has_whole_models:
            self._try_out()

    def _why_not_parts(self):
        return super()._why_not_parts() | self._sharing.parts | start.head_part()

    def _say_what_trl_lacks(self) -> None:
        """Warn once of what TRL's own code does here; raise an error if the user has asked for ours."""
        if self._completions != 1 and (reason := why_not(self._trl_class, COMPLETIONS)):
            raise ValueError(f"num_generations must be 1 with this TRL, got {self._completions}: {reason}")
        if reason := why_not(self._trl_class, TREES):
            self._sharing.allowed(reason)

    # The properties below are made when they are first needed, as in `Sampling`

    @functools.cached_property
    def _sharing(self) -> Sharing:
        return Sharing(self.args)

    @functools.cached_property
    def _on_trees(self) -> set[Any]:
        """The models whose backbones take token trees, without their wrappers."""
        return set()

    @functools.cached_property
    def _images(self) -> TrainerImages:
        return TrainerImages()

    @functools.cached_property
    def _keep_trls(self) -> Fallback:
        return Fallback("FlashPO leaves the divergence to TRL: {reason}.")

    def _try_out(self) -> None:
        """Find out which models can run on token trees. All ranks do this together, before the models first run."""
        if self._tried or self._sharing.mode is False or why_not(self._trl_class, TREES):
            return
        self._tried = True
        models = [("", self.model)]
        for name, teacher in self.teachers.items():
            teacher.eval()  # of a DeepSpeed engine this returns None, not the module
            models.append((f"the teacher {name!r}: " if len(self.teachers) > 1 else "the teacher: ", teacher))
        for who, model in models:
            with self.accelerator.autocast():
                reason = why_not_packed(model)
            if self._sharing.allowed(reason and who + reason):
                lm = CausalLM.of(model)
                accept_trees(lm.backbone, head=False)
                self._sharing.compile(lm.backbone, self._phases)
                self._on_trees.add(lm.base)

    # batches

    @property
    def _column(self) -> str:
        return getattr(self.args, "teacher_column", "teacher")  # TRL's own configuration has no such field

    @property
    def _completions(self) -> int:
        """Completions of each prompt in training."""
        return getattr(self.args, "num_generations", 1)

    def get_train_dataloader(self):
        with self._prompts_repeated("repeat_iterable_dataset"):
            return super().get_train_dataloader()

    def _get_train_sampler(self, dataset=None):
        with self._prompts_repeated("RepeatSampler"):
            return super()._get_train_sampler(dataset)

    @contextlib.contextmanager
    def _prompts_repeated(self, name: str) -> Iterator[None]:
        """Within the block TRL's generation batches hold each prompt `num_generations` times and fewer prompts, so that
        the number of rows stays the same."""

        def repeated(original: Callable) -> Callable:
            def repeat(*args, mini_repeat_count, batch_size, **options):
                times = self._completions
                return original(
                    *args, mini_repeat_count=mini_repeat_count * times, batch_size=batch_size // times, **options
                )

            return repeat

        if self._completions == 1:
            yield
            return
        with replaced(importlib.import_module(self._trl_class.__module__), name, repeated):
            yield

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if len(self.teachers) > 1 and self._column not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, self._column]

    @in_place_of_trls(GROUPS)
    def _prepare_inputs(self, generation_batch):
        if self._completions == 1 or self._sharing.mode is False:
            return super()._prepare_inputs(generation_batch)
        with groups_stay_together(self._trl_class, self._completions):
            return super()._prepare_inputs(generation_batch)

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if len(self.teachers) > 1:
            batch[WHICH] = places(inputs, self._column, list(self.teachers)).to(batch["completion_ids"].device)
        return batch

    @in_place_of_trls(ROLLOUTS)
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        rollouts = self._rollouts.generate(prompt_ids, images, multimodal_fields) if active() else None
        if rollouts is None:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        return rollouts.completion_ids

    # loss

    def compute_loss(self, *args, **kwargs):
        self._try_out()
        loss = super().compute_loss(*args, **kwargs)
        if overridden(self, "log"):
            self.flush_metrics()  # the subclass's `log` may read `_metrics` before it calls ours, or never call it
        return loss

    @in_place_of_trls(TREES)
    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        ours = scores() and self._comparable(unwrapped_student)
        scored = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        parts = [(self.teacher_model, scored, inputs)]
        if len(self.teachers) > 1:  # TRL's loss once for each teacher; tool_mask leaves out the rows of other teachers
            of_rows = [(inputs[WHICH] == i)[:, None] * scored for i in range(len(self.teachers))]
            parts = [(t, rows, inputs | {"tool_mask": rows}) for t, rows in zip(self.teachers.values(), of_rows)]
            if num_items_in_batch is None:
                num_items_in_batch = scored.sum().clamp(min=1)
        batch = self._batch(unwrapped_student, inputs) if ours else None
        results, first = [], self.teacher_model
        comparisons: list[Comparison] = []
        try:
            for self.teacher_model, rows, part in parts:
                if ours:
                    known = comparisons[-1].student if comparisons else None
                    models = unwrapped_student, self.accelerator.unwrap_model(self.teacher_model)
                    self._comparison = Comparison(models, inputs["completion_ids"], rows, scored, known, batch)
                    comparisons.append(self._comparison)
                with self._divergence_by(self._comparison):
                    results.append(super()._compute_loss(unwrapped_student, part, num_items_in_batch))
        finally:
            self._comparison, self.teacher_model = None, first
        if comparisons:
            self._pending.sums[self._mode].append(torch.stack([comparison.sums for comparison in comparisons]))
        return results[0] if len(results) == 1 else tuple(map(sum, zip(*results)))

    def _comparable(self, student) -> bool:
        """Whether `linear_divergence` takes the heads; warns with the reason if it does not."""
        if reason := why_not_comparable(self._models(student)):
            self._keep_trls(reason)
        return bool(self.teachers) and not reason

    def _models(self, student) -> list[Any]:
        return [student, *(self.accelerator.unwrap_model(teacher) for teacher in self.teachers.values())]

    def _batch(self, student, inputs) -> Batch | None:
        """The micro-batch as models take it on trees; None if something other than its text prevents that."""
        models = [model for model in self._models(student) if CausalLM.of(model).base in self._on_trees]
        if not models:
            return None
        tokens = tokens_of(inputs)
        try:
            with self.accelerator.autocast():
                images = self._images.of(models, {name: inputs.get(name) for name in SCORING_INPUTS}, *tokens)
        except (TypeError, ValueError) as error:
            self._sharing.allowed(str(error))
            return None
        return Batch(*tokens, images)

    @contextlib.contextmanager
    def _divergence_by(self, comparison: Comparison | None) -> Iterator[None]:
        if comparison is None:
            yield
            return
        module = importlib.import_module(self._trl_class.__module__)
        with replaced(module, "_chunked_divergence_loss", lambda original: comparison.loss):
            yield

    @in_place_of_trls(TREES)
    def _get_last_hidden_state(self, unwrapped_model, input_ids, attention_mask, logits_to_keep, **multimodal):
        comparison, tokens = self._comparison, (input_ids, attention_mask)
        padded: Callable = functools.partial(super()._get_last_hidden_state, logits_to_keep=logits_to_keep)
        if comparison is None:
            return padded(unwrapped_model, *tokens, **multimodal)
        of_student, comparison.asked = not comparison.asked, True  # TRL asks first for the student's states
        if of_student and comparison.student is not None:
            return comparison.student.hidden
        scored = comparison.of_all if of_student else comparison.scored
        beside = beside_text(unwrapped_model, multimodal)
        phase, padded_tokens = self._phases.reference_begins(), input_ids.numel()
        tree = None
        if comparison.batch is not None and self._takes_tree(unwrapped_model, attention_mask):
            known = comparison.student and comparison.student.tree
            if known is not None and scored is comparison.of_all:
                tree = known
            else:
                tree = Batch(*tokens, comparison.batch.images).pack([unwrapped_model], scored, prune=True)
            if not self._sharing.pays(CausalLM.of(unwrapped_model).backbone, tree):
                tree = None
        if not self._sharing.agreed(tree is not None, [unwrapped_model], tree is not None and tree.images is not None):
            tree = None
        if tree is not None:
            states = States.on(tree, unwrapped_model)
        elif of_student or beside or len(self.teachers) < 2:
            states = States(padded(unwrapped_model, *tokens, **multimodal), None)
        else:
            rows = scored.any(1).nonzero()[:, 0]
            rows = rows if len(rows) else rows.new_zeros(1)  # other ranks may wait for this rank's forward
            hidden = padded(unwrapped_model, *(x[rows] for x in tokens))
            states = States(hidden.new_zeros(len(input_ids), *hidden.shape[1:]).index_copy(0, rows, hidden), None)
            padded_tokens = len(rows) * input_ids.shape[1]
        run = padded_tokens if states.tree is None else len(states.tree.tokens)
        self._phases.ran(run, input_ids.numel(), states.tree is not None)
        self._phases.reference_ends(phase)
        if overridden(self, "_get_last_hidden_state"):
            return states.as_rows()  # the subclass's method expects TRL's layout, and its result is what counts
        if of_student:
            comparison.student = states
        else:
            comparison.teacher = states
        return states.hidden

    def _takes_tree(self, model: Any, attention_mask: Tensor) -> bool:
        """Whether the model runs this batch on a tree."""
        if CausalLM.of(model).base not in self._on_trees:
            return False
        counted = not attention_mask[:, 0].all() and not padding_changes_nothing(model)
        reason = "rows are padded on the left, and the model's positions count the padding" if counted else ""
        return self._sharing.allowed(reason)

    # logs

    def flush_metrics(self) -> None:
        """Move the pending sums of all micro-batches into `_metrics`, with one collective."""
        for mode, pending in self._pending.sums.items():
            if not pending:
                continue
            table = self.accelerator.reduce(torch.stack(pending).sum(0), reduction="sum").tolist()
            pending.clear()
            metrics = self._metrics[mode]
            agreed, log_ratio, _, tokens = map(sum, zip(*table))
            metrics["teacher/agreement"].append(agreed / max(tokens, 1.0))
            metrics["teacher/log_ratio"].append(log_ratio / max(tokens, 1.0))
            for name, (*_, divergence, tokens) in zip(self.teachers, table):
                if len(table) > 1 and tokens:
                    metrics[f"teacher/{name}/divergence"].append(divergence / tokens)

    def log(self, logs, *args, **kwargs):
        self.flush_metrics()
        return super().log(logs, *args, **kwargs)
