"""Whether a forward drew random numbers: dropout, NEFTune and noise on routers do. Rollouts run without any of them."""

import torch
from torch import Tensor


class RandomDraws:
    """True as soon as a generator of torch, the CPU's or one of the kind of `device`, has been drawn from since this
    was made.

    It asks the generators and not the modules: dropout has many names in configs, adapters and hooks, and an adapter
    that is still the identity draws, too. To read a generator's state costs microseconds and waits for no device.
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
