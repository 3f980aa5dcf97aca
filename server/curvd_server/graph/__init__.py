"""Models and losses as graphs: decoded, checked, tried without memory, interpreted.

A graph comes from a stranger. Nothing of it is ever evaluated, compiled, imported or
opened: `decode` checks its structure without torch, `operators` finds each operator on
the allow-list and fits the arguments to its schema, `dryrun` runs it on the device
``meta`` within limits, and `interpret` is the loop that runs it.
"""
