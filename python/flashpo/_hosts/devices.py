"""The devices that FlashPO has run on, and which of its parts have never run on a given one."""

import platform

import torch

RAN_ON = {(9, 0): "H100 and H200"}  # by NVIDIA's compute capability; kernels for other targets were only compiled
NEVER_ON_GPUS = "tree_recurrence (hybrid models)"


def never_run(device: str) -> str:
    """The parts of FlashPO that have never run on a device of this type, in words; empty if all have."""
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
    """The name of the device, with the properties that matter to FlashPO's kernels."""
    if device == "cuda":
        p = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    if device == "cpu":
        from flashpo import _op

        kernels = f"{_op.native.isa} kernels" if _op.native else "no C++ kernels"
        return f"{platform.machine()} CPU, {kernels}, {torch.get_num_threads()} threads"
    return device
