"""What happens before a training: lines that say which parts of FlashPO run, and a verification if one is asked for."""

import os
import sys
from typing import Any

from flashpo import __version__
from flashpo._hosts import devices
from flashpo._hosts.versions import FLOORS, installed, standing
from flashpo.trl import experimental, switches
from flashpo.trl.verify import VerificationError, verify

_said: set[str] = set()  # classes of trainers that were announced, and the line of versions
verify_alone = False  # whether to end the script after its first trainer was verified


class Verified(SystemExit):
    """Ends a script that runs under `flashpo verify`."""


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def before_training(trainer: Any) -> None:
    """Print the lines, let an experimental trainer of TRL share prompts if it can, and verify.

    Raises:
        VerificationError: TRL and FlashPO disagree. Under `flashpo verify` the exit status says so instead.
    """
    say(trainer)
    known = experimental.of(type(trainer))
    if known is not None and known.shares and switches.current().trees:
        experimental.share_prompts(trainer)
    if steps := switches.current().verify:
        _verify(trainer, steps)


def say(trainer: Any) -> None:
    """Print once for each class what it replaces and which parts run; and once the versions and the device."""
    cls = type(trainer)
    if cls.__qualname__ in _said or not is_first_process():
        return
    _said.add(cls.__qualname__)
    for line in lines(trainer):
        print(f"flashpo: {line}", file=sys.stderr)
    if (line := machine(trainer.accelerator.device.type)) not in _said:
        _said.add(line)
        print(f"flashpo: {line}", file=sys.stderr)


def lines(trainer: Any) -> list[str]:
    """The lines for one trainer: what it is, and which of its parts run."""
    cls = type(trainer)
    ours = next((base for base in cls.__mro__ if base.__module__.partition(".")[0] == "flashpo"), None)
    if ours is None:
        from flashpo.trl.report import why_not_more

        return [f"{cls.__name__} ({cls.__module__}) is not replaced: {why_not_more(cls, [], {})}"]
    stock = f"trl.{trainer._trl_class.__name__}"
    name = f"flashpo.trl.{ours.__name__}"
    what = (
        f"{name} runs in the place of {stock}" if stock.endswith(f".{ours.__name__}") else f"{name} is made of {stock}"
    )
    own = "" if cls is ours else f"{cls.__name__} is a subclass: "
    off = " ".join(switches.current().off())
    parts = trainer._why_not_parts().items()
    said = "; ".join(f"{part} {f'no: {reason}' if reason else 'yes'}" for part, reason in parts)
    return [own + what + (f", with {off}" if off else ""), f"{cls.__name__}: {said}"]


def head_part() -> dict[str, str]:
    """The entry "LM head" among the parts of a trainer that scores tokens, see `Accelerated._why_not_parts`."""
    return {"LM head": "" if switches.current().head else "--no-head"}


def machine(device: str) -> str:
    versions = [f"flashpo {__version__}"]
    for package in FLOORS:
        version = installed(package) or "none"
        known = standing(package, version)
        versions.append(f"{package} {version}" + ("" if known == "supported" else f" ({known})"))
    never = devices.never_run(device)
    return f"{', '.join(versions)}; {devices.name(device)}; never run on such a device: {never or 'nothing'}"


def _verify(trainer: Any, steps: int) -> None:
    if not hasattr(trainer, "_metrics"):
        print(f"flashpo: {type(trainer).__name__} is no trainer of TRL: it is not verified", file=sys.stderr)
        return
    try:
        found, status = str(verify(trainer, steps)), 0
    except VerificationError as error:
        if not verify_alone:
            raise
        found, status = str(error), 1
    if is_first_process():
        for line in found.splitlines():
            print(f"flashpo: {line}", file=sys.stderr)
    if verify_alone:
        raise Verified(status)
