"""On which machines FlashPO has run, and what of it has never run on the one at hand."""

import platform

import torch

RAN_ON = {(9, 0): "H100 and H200"}  # compute capabilities of NVIDIA; other targets are compiled for and never ran
NEVER_ON_GPUS = "tree_recurrence (hybrid models)"


def never_run(device: str) -> str:
    """What of FlashPO has never run on a device of this kind, in words; empty where all of it has."""
    if device == "cuda" and torch.version.hip:
        return "everything on AMD GPUs: the Triton kernels are compiled for gfx942 only, and have run on none"
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) not in RAN_ON:
            return f"everything on sm_{major}{minor}: FlashPO has run on {', '.join(RAN_ON.values())} only"
        return f"{NEVER_ON_GPUS} on a GPU"
    if device == "cpu":
        known = platform.machine().lower() in ("x86_64", "amd64")
        return "" if known else f"the C++ kernels on {platform.machine()}, but in an emulator"
    return f"everything on {device}: its kernels are for CPUs and CUDA"


def name(device: str) -> str:
    """Of the device and what FlashPO's kernels make of it."""
    if device == "cuda":
        p = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    if device == "cpu":
        from flashpo import _op

        kernels = f"{_op.native.isa} kernels" if _op.native else "no C++ kernels"
        return f"{platform.machine()} CPU, {kernels}, {torch.get_num_threads()} threads"
    return device
