"""TRL's trainers, accelerated: `from flashpo.trl import GRPOTrainer` in the place of `from trl import GRPOTrainer`.

Each is TRL's own class; it scores its tokens with FlashPO, and any other trainer of the process stays as it is.
"""

import transformers
from trl.trainer import dpo_trainer, kto_trainer, sft_trainer  # not trl's names: `flashpo run` replaces them

from flashpo.trl.patch import patched


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


class SFTTrainer(Accelerated, sft_trainer.SFTTrainer):
    pass


class DPOTrainer(AcceleratedReference, dpo_trainer.DPOTrainer):
    pass


class KTOTrainer(AcceleratedReference, kto_trainer.KTOTrainer):
    pass
