"""The CUDA C++ kernels: a library next to `flashpo._C` for each major version of CUDA, such as `libflashpo_cuda13.so`.

A wheel that was built with a CUDA compiler contains the library. Otherwise the wheel `flashpo-cuda13` puts it into the
same folder. It is loaded when kernels on a GPU are first asked for. Without it, those operators run as they do without
C++.
"""

import re
from pathlib import Path
from types import ModuleType

import torch

NAME = re.compile(r"libflashpo_cuda(\d+)\.so")


def why_not(native: ModuleType) -> str:
    """Load the library for `flashpo._C`. Return "", or the reason why there is none for this torch and these GPUs."""
    folder = Path(native.__file__ or "").parent
    found = {int(name[1]): path for path in folder.iterdir() if (name := NAME.fullmatch(path.name))}
    if not found:
        return "no libflashpo_cuda*.so next to flashpo._C (built without a CUDA compiler)"
    names = ", ".join(path.name for path in found.values())
    if torch.version.cuda is None:
        return f"torch is built without CUDA, so {names} is not loaded"
    # A driver runs code that was built for its own major version of CUDA and for older ones; torch's is among these.
    fitting = [major for major in found if major <= int(torch.version.cuda.partition(".")[0])]
    if not fitting:
        return f"{names} is for a newer CUDA than torch's {torch.version.cuda}"
    library = found[max(fitting)]
    try:
        architecture = native.load_cuda_library(str(library))
    except RuntimeError as error:
        return f"{library.name} does not load: {error}"
    oldest = min((major * 10 + minor for major, minor in _capabilities()), default=architecture)
    if oldest < architecture:
        return f"{library.name} has kernels from sm_{architecture} on, this GPU is sm_{oldest}"
    return ""


def _capabilities() -> list[tuple[int, int]]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
