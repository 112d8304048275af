"""Lines of text about which parts of TRL FlashPO uses: for `flashpo doctor` and the start of `flashpo run`."""

import importlib.util

from flashpo._hosts import Seam, trl
from flashpo._hosts.versions import standing


def of_trl() -> list[str]:
    """A summary and then a line for each seam in TRL; empty if TRL is not installed. It imports TRL's trainers."""
    if importlib.util.find_spec("trl") is None:
        return []
    try:
        there = [name for name in trl.TRAINERS if not trl.lacks(name)]
        seams = {name: trl.seams(trl.trainer_class(name)) for name in there}
        scoring = [*trl.scoring_seams(), trl.divergence_seam()]
    except Exception as error:  # of any kind: it is an installation of TRL that does not import
        return [f"TRL {trl.version()} does not import: {type(error).__name__}: {error}"]
    whole = [name for name, found in seams.items() if not any(seam.reason for seam in found)]
    part = [name for name, found in seams.items() if name not in whole and not all(seam.reason for seam in found)]
    none = [name for name in seams if name not in whole + part]
    gone = [name for name in trl.TRAINERS if name not in seams]
    what = [("accelerated", whole), ("accelerated in part", part), ("as in TRL", none), ("not in this TRL", gone)]
    said = "; ".join(f"{', '.join(names)} {how}" for how, names in what if names)
    lines = [f"TRL {trl.version()}: {standing('trl', trl.version())}; {said}"]
    return lines + [f"  {seam}" for seam in [*scoring, *(seam for found in seams.values() for seam in found)]]


def of_trainer(name: str) -> list[Seam]:
    return trl.seams(trl.trainer_class(name))
