"""TRL's trainers, accelerated: `from flashpo.trl import GRPOTrainer` in the place of `from trl import GRPOTrainer`.

Each is TRL's own class; it scores its tokens with FlashPO, and any other trainer of the process stays as it is.
"""

import transformers
import trl

from flashpo.trl.patch import active, patched


class Accelerated(transformers.Trainer):
    """Opens the patch around the methods in which a TRL trainer runs its model on labels."""

    def training_step(self, *args, **kwargs):
        with patched():
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        with patched():
            return super().prediction_step(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        with patched():
            return super().compute_loss(*args, **kwargs)


class AcceleratedReference(Accelerated):
    """For trainers that can score the reference model for a whole dataset at once (`precompute_ref_log_probs`)."""

    def compute_ref_log_probs(self, *args, **kwargs):
        with patched():
            return super().compute_ref_log_probs(*args, **kwargs)  # type: ignore[misc]  # of the TRL class beside it


class SFTTrainer(Accelerated, trl.SFTTrainer):
    pass


class DPOTrainer(AcceleratedReference, trl.DPOTrainer):
    pass


class KTOTrainer(AcceleratedReference, trl.KTOTrainer):
    pass


class GRPOTrainer(Accelerated, trl.GRPOTrainer):
    def _compute_loss(self, model, inputs):
        """TRL projects what tools answered to the vocabulary and then masks it; here it does not reach the head."""
        tool_mask = inputs.get("tool_mask")
        if tool_mask is None or not active():
            return super()._compute_loss(model, inputs)
        tool = tool_mask == 0

        def without_tools(*args, labels, **kwargs):
            labels = labels.clone()
            labels[:, -tool.shape[1] :].masked_fill_(tool, -100)
            return model(*args, labels=labels, **kwargs)

        # The policy's log-probs of these tokens are 0 now, so the others have to be: an exp(0 - old) that overflows
        # would not be undone by the loss mask
        names = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
        scored = {name: inputs[name].masked_fill(tool, 0.0) for name in names if inputs.get(name) is not None}
        return super()._compute_loss(without_tools, inputs | scored)


class RLOOTrainer(Accelerated, trl.RLOOTrainer):
    pass
