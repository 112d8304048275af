"""`share_prefix` and `compile_layers` of a trainer's arguments: whether it runs on token trees and compiles layers, and
the warnings or errors if it cannot."""

import functools
from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from flashpo._causal_lm import text_model
from flashpo._hosts import sharding
from flashpo.packing import TokenTree, dense
from flashpo.packing.compiled import compile_layers
from flashpo.packing.parity import parity
from flashpo.packing.support import packable, why_not_packable
from flashpo.trl import switches
from flashpo.trl._fallback import Fallback
from flashpo.trl._phases import COMPILING, Phases


class Sharing:
    """The setting `share_prefix` of a trainer, in `mode`.

    "auto": use token trees where model and batch allow it, otherwise padded rows after a warning with the reason. True:
    raise an error instead of the warning. False: always use padded rows.
    """

    def __init__(self, args):
        self.mode = getattr(args, "share_prefix", "auto")  # TRL's own configurations have no such field
        self._off = "share_prefix=False"
        if switch := switches.current().why_no_trees:
            self.mode, self._off = False, switch
        noise = getattr(args, "neftune_noise_alpha", None)
        self.against = "neftune_noise_alpha: its noise depends on the length of a padded row" if noise else ""
        strict = "share_prefix=True, but {reason}" if self.mode is True else None
        self.refuse = Fallback("FlashPO scores padded rows here, prompts are not shared: {reason}.", strict)
        self._compiles = getattr(args, "compile_layers", False)
        self._uncompiled = Fallback("FlashPO runs decoder layers uncompiled: {reason}.")
        self._skip = Fallback("FlashPO scores some batches as padded rows: {reason}.")

    @property
    def why_not(self) -> str:
        """Why token trees are not used, as far as that is known now; empty if nothing prevents them."""
        return self._off if self.mode is False else self.against or self.refuse.first

    @property
    def parts(self) -> dict[str, str]:
        """The parts of FlashPO that this setting decides about, each with the reason why it does not run; empty if it
        runs."""
        trees = {"token trees": self.why_not}
        return trees | ({"compiled layers": self.why_not or self._uncompiled.first} if self._compiles else {})

    def compile(self, backbone: nn.Module, phases: Phases) -> None:
        """Compile the layers of a model that takes trees, if `compile_layers` of the arguments says so."""
        if self._compiles:
            compile_layers(backbone, self._uncompiled, functools.partial(phases.of, COMPILING))

    def allowed(self, reason: str) -> bool:
        """Whether to run on a tree. Warns or raises if `reason` says what prevents it; it is empty if nothing does."""
        reason = self.against or reason
        if self.mode is not False and reason:
            self.refuse(reason)
        return self.mode is not False and not reason

    def pays(self, backbone: nn.Module, tree: TokenTree) -> bool:
        """Whether this tree is better than padded rows for `backbone`, which takes trees. Warns if it is not."""
        text = text_model(backbone)
        if self.mode is True or not dense.installed(text) or dense.pays(tree):
            return True
        self._skip(
            f"the attention of {type(text).__name__} takes a token tree as one dense mask, which has more scores than "
            "padded rows where the rows share little"
        )
        return False

    def agreed(self, on_tree: bool, models: Iterable[nn.Module], shows: bool = False) -> bool:
        """Whether a batch runs on its tree; if forwards of the models have collectives, on all ranks or on none.

        Padded rows and a tree may take different numbers of forwards and gather the head at different times, and only
        trees with images run the tower. A rank that ran its batch in another way than the others would wait for them
        forever. Therefore all ranks have to ask for every batch.

        shows: whether the tree has images.
        """
        if self.mode is False:
            return False
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not several or not any(map(sharding.meets, models)):
            return on_tree
        least = torch.tensor([on_tree, shows, not shows], dtype=torch.int64, device=PartialState().device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        trees, all_show, none_shows = least.bool().tolist()
        if on_tree and not trees:
            self._skip("another process has a batch that cannot run on a tree, and the model is sharded over them")
        elif on_tree and not (all_show or none_shows):
            self._skip("only some processes have a batch with images, and the model is sharded over them")
        return trees and (all_show or none_shows)


def why_not_packed(model: nn.Module, head: bool = True) -> str:
    """What prevents token trees on any rank; empty if nothing does. All ranks get the same answer.

    All ranks have to ask together, outside of a forward of `model`, and in the autocast in which it trains.
    """
    static = packable(model).reason if head else why_not_packable(model)
    return next(filter(None, gather_object([static])), "") or parity(model, head, gather_object)
