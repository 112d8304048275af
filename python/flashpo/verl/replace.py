"""The same, with our estimators and losses under verl's own names: `VERL_USE_EXTERNAL_MODULES=flashpo.verl.replace`."""

from flashpo.verl import register

register(replace=True)
