"""Whether a forward drew random numbers, as dropout, NEFTune and noise on routers do. Rollouts run without these."""

import torch
from torch import Tensor


class RandomDraws:
    """Is true once random numbers have been drawn from torch's generators since this object was made.

    It looks at the generator of the CPU and at those of all devices of the same type as `device`. It compares the
    states of generators instead of searching modules for dropout, because dropout has many names in configs, adapters
    and hooks, and because an adapter draws random numbers even while it is still the identity. Reading a generator's
    state takes microseconds and does not wait for a device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._before = self._states()

    def __bool__(self) -> bool:
        return not all(map(torch.equal, self._before, self._states()))

    def _states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            return states + torch.cuda.get_rng_state_all()  # the layers of a model may be spread over devices
        if self.device.type != "cpu":
            states.append(torch.get_device_module(self.device).get_rng_state())
        return states
