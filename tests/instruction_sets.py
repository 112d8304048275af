"""The C++ kernels' tests on every instruction set of this processor: python tests/instruction_sets.py <for pytest>

The best set runs with 3 threads, the others with 1: 2 are what all other tests run with.
"""

import os
import subprocess
import sys

from flashpo._op import native

for isa in ("baseline", "avx2", "avx512", "amx"):
    if isa not in native.isas:
        print(f"{isa}: left out, this processor, compiler or system does not have it", flush=True)
        continue
    threads = "3" if isa == native.isas[-1] else "1"
    print(f"{isa}, {threads} threads", flush=True)
    environment = os.environ | {"FLASHPO_ISA": isa, "OMP_NUM_THREADS": threads}
    status = subprocess.run([sys.executable, "-m", "pytest", *sys.argv[1:]], env=environment).returncode
    if status != 0:
        sys.exit(status)
