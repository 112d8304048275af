"""The dtype in which a trainer really computes."""

import torch

from flashpo._precision import autocast_to


def autocast_dtype(accelerator) -> torch.dtype | None:
    """The dtype that the accelerator's autocast casts to; None without autocast. The setting `mixed_precision` does not
    tell: fp16 has no effect on a CPU, for example."""
    device = accelerator.device.type
    with accelerator.autocast():
        return autocast_to(device)
