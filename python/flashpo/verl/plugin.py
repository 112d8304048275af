"""For verl's plugin hooks, which import a module and call nothing."""

from flashpo.verl import register

register()
