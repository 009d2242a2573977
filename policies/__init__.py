"""WHAT to decide: numpy, numba, msgspec and the standard library, nothing else.

A policy has two verbs. `decide` turns requests (what each task needs and its user wants) and the models' live state
into decisions. `learn` updates the policy with the outcomes. Start with types.py, then thompson/policy.py.
"""
