"""Runs the C++ kernels' tests on the processor's other instruction sets: python tests/instruction_sets.py <pytest args>

It uses one thread. All other tests run on the best instruction set with 2 threads. `make sanitize` runs them with 3.
"""

import os
import subprocess
import sys

from flashpo._op import native

for isa in native.isas[:-1]:
    print(isa, flush=True)
    environment = os.environ | {"FLASHPO_ISA": isa, "OMP_NUM_THREADS": "1"}
    status = subprocess.run([sys.executable, "-m", "pytest", *sys.argv[1:]], env=environment).returncode
    if status != 0:
        sys.exit(status)
