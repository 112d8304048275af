"""The precision in which a trainer really computes."""

import torch


def autocast_dtype(accelerator) -> torch.dtype | None:
    """What the accelerator's autocast casts to. Its `mixed_precision` is a wish: fp16 on a CPU, say, is not granted."""
    device = accelerator.device.type
    with accelerator.autocast():
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
