"""Importing this registers our losses and estimators under verl's own names, too.

verl imports it with `VERL_USE_EXTERNAL_MODULES=flashpo.verl.replace`.
"""

from flashpo.verl import register

register(replace=True)
