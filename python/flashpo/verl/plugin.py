"""The module for verl's plugin hooks, which import a module but call nothing: importing it registers our functions."""

from flashpo.verl import register

register()
