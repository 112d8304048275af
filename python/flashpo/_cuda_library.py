"""The CUDA C++ kernels: a library beside `flashpo._C`, one for each major version of CUDA, as `libflashpo_cuda13.so`.

A wheel that was built where there is a CUDA compiler has it. The wheel `flashpo-cuda13` puts it into the same folder.
It is loaded when something first asks for kernels on a GPU. Without it those operators run as they do without C++.
"""

import re
from pathlib import Path
from types import ModuleType

import torch

NAME = re.compile(r"libflashpo_cuda(\d+)\.so")


def why_not(native: ModuleType) -> str:
    """Loads the library for `flashpo._C`, and gives the reason where there is none for this torch and these GPUs."""
    folder = Path(native.__file__ or "").parent
    found = {int(name[1]): path for path in folder.iterdir() if (name := NAME.fullmatch(path.name))}
    if not found:
        return "no libflashpo_cuda*.so beside flashpo._C (built without a CUDA compiler)"
    names = ", ".join(path.name for path in found.values())
    if torch.version.cuda is None:
        return f"torch is built without CUDA, so {names} is not loaded"
    # A driver runs what was built for its own major version and for older ones; torch's CUDA is one that it runs.
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
