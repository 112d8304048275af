"""The dtype in which a trainer really computes."""

import torch


def autocast_dtype(accelerator) -> torch.dtype | None:
    """The dtype that the accelerator's autocast casts to; None without autocast. The setting `mixed_precision` does not
    tell: fp16 has no effect on a CPU, for example."""
    device = accelerator.device.type
    with accelerator.autocast():
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
