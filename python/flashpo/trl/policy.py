"""What GRPOTrainer and RLOOTrainer share: TRL's trainers on `policy_loss` and `group_advantages`.

Results are the same as TRL's, and every `LossSpec` can be trained with. A policy trainer is put together from these
parts; this file has the choice of the loss, and the log-probs of the sampler.

    advantages.py    generation of a batch, rewards, advantages
    scoring.py       log-probs and entropies of completions
    metrics.py       what is logged
"""

import torch
from torch import Tensor

from flashpo._hosts.trl import (
    ADVANTAGES,
    DYNAMIC_SAMPLING,
    GROUPS,
    LOSS,
    OLD_LOGPROBS,
    TREES,
    why_not,
    why_unknown,
)
from flashpo.ops.loss_spec import LossSpec
from flashpo.rollout.seam import eval_mode
from flashpo.trl import options
from flashpo.trl.accelerated import overridden
from flashpo.trl.metrics import PolicyMetrics
from flashpo.trl.patch import active
from flashpo.trl.rollout import mismatch
from flashpo.trl.scoring import PolicyScoring

QUIET = "quiet_per_token_logps"  # key of a batch: log-probs of the completions by a forward without dropout


class PolicyTrainer(PolicyMetrics, PolicyScoring):
    """The common base of GRPOTrainer and RLOOTrainer; to be combined with a TRL class."""

    _loss_helpers: tuple[str, ...] = ()  # methods that TRL's `_compute_loss` calls and ours does not

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._say_what_trl_lacks()
        if self._has_whole_models or why_not(self._trl_class, TREES):
            self._packed.ready()

    def _say_what_trl_lacks(self) -> None:
        """Warn once of what TRL's own code does here; raise an error if the user has asked for ours."""
        for what, left, option, neutral in (
            (LOSS, "the loss", "loss", None),
            (ADVANTAGES, "the advantages", "group_by", None),
            (GROUPS, "the order of completions", "", None),
            (DYNAMIC_SAMPLING, "", "dynamic_sampling", 0),
            (OLD_LOGPROBS, "", "old_logprobs", "trainer"),
        ):
            if not (reason := why_not(self._trl_class, what)):
                continue
            if (value := getattr(self.args, option, neutral)) != neutral:
                raise ValueError(f"{option}={value!r} is not available with this TRL: {reason}")
            if left:
                self._keep_trls(f"{left} to TRL: {reason}")

    # loss

    def _loss_spec(self) -> LossSpec:
        """The loss that the configuration asks for, by TRL's options or by ours.

        Raises:
            TypeError, ValueError: no LossSpec computes this loss.
        """
        raise NotImplementedError

    def _spec_of(self, inputs) -> LossSpec:
        """The loss of one micro-batch."""
        return self._loss_spec()

    def _spec_or_none(self, inputs) -> LossSpec | None:
        """What `_spec_of` returns; None, after a warning, if TRL's own `_compute_loss` must run."""
        if getattr(self.args, "loss", None):
            return self._spec_of(inputs)
        reason = self._why_trls_loss(inputs)
        if not reason:
            try:
                return self._spec_of(inputs)
            except (TypeError, ValueError) as error:  # an option has a value with which TRL's own code may train
                reason = str(error)
        self._keep_trls(f"the loss to TRL: {reason}")
        return None

    def _why_trls_loss(self, inputs) -> str:
        """Why no LossSpec computes TRL's loss of this micro-batch; empty if one does."""
        reason = options.why_trls_loss(self, self._options)
        theirs = [name for name in self._loss_helpers if overridden(self, name)]
        reason = reason or ", ".join(f"{type(self).__name__} has a {name} of its own" for name in theirs)
        return reason or next(filter(None, (why_unknown(self._trl_class, name) for name in self._loss_helpers)), "")

    def _sampler_logprobs(self, inputs, logprob: Tensor, mask: Tensor, random: bool) -> Tensor | None:
        """The sampler's log-probs in the form in which the loss compares them with the trainer's; None if it must not.

        The engine samples without dropout. Log-probs of a forward with dropout differ from the engine's by the noise of
        the dropout. This noise is not a mismatch between sampler and trainer: it must neither weigh sequences nor be
        logged as a mismatch. If the batch has log-probs of a forward without dropout, the mismatch is computed from
        them.

        Args:
            random: whether the trainer's forward drew random numbers.
        """
        if self._mode == "train":
            self._pending.noisy = random
        sampled = inputs.get("sampling_per_token_logps")
        if sampled is None or not self._rollouts.generated:
            return sampled
        trained = inputs.get("old_per_token_logps", logprob).detach()
        if QUIET in inputs:
            sampled = trained - (inputs[QUIET] - sampled)
        elif random:
            self._rollouts.say_uncorrected()
            return None
        if not self._takes_old_logprobs():
            self._pending.mismatch[self._mode].append(mismatch(trained, sampled, mask))
        return sampled

    def _accumulation(self) -> float:
        return self.current_gradient_accumulation_steps if self._mode == "train" else 1.0

    # generation

    def _generate(self, *args, **kwargs):
        result = super()._generate(*args, **kwargs)
        if self._rollouts.generated and self._takes_old_logprobs():
            self._pending.old = self._padded(self._sampled_logprobs(result))
        return result

    def _padded(self, logprobs: list[list[float]]) -> Tensor:
        """The log-probs of completions in the shape in which TRL pads their tokens."""
        rows = [torch.tensor(row, dtype=torch.float32, device=self.accelerator.device) for row in logprobs]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        missing = -padded.shape[1] % (getattr(self, "pad_to_multiple_of", None) or 1)
        return torch.nn.functional.pad(padded, (0, missing))

    def _sampled_logprobs(self, generated: tuple) -> list[list[float]]:
        """The sampler's log-probs of each completion, from what `_generate` returned; 0 at tokens that tools wrote."""
        raise NotImplementedError

    def _wants_quiet_logprobs(self, batch: dict) -> bool:
        """Whether the loss needs log-probs of a forward without dropout to compute the rollout's mismatch."""
        return False

    def _quiet_logprobs(self, batch: dict) -> Tensor:
        """Log-probs (B, C) of the completions by the model in eval mode, which is what the engine samples from."""
        if active():
            self._packed.prepare()  # before eval_mode: it looks at the adapters, and needs the model to itself for it
        self._phases.count(tokens=-self._size(batch), tokens_saved=-self._size(batch))  # TRL has no such forward
        with eval_mode(self.model), self.accelerator.autocast():
            return self._score(self.model, batch, self.args.per_device_train_batch_size)[0]

    def _takes_old_logprobs(self) -> bool:
        """Whether TRL scores the completions by the policy now, and the rollout's log-probs are to be used instead."""
        return getattr(self.args, "old_logprobs", "trainer") == "rollout"

    def _complete(self, batch, scored):
        if self._wants_quiet_logprobs(batch):
            batch[QUIET] = self._quiet_logprobs(batch)
