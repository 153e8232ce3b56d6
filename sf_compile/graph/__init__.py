"""The graph pipeline: normalize -> match -> plan -> rewrite, each stage a file of its own.

Stages hand each other frozen dataclasses. No stage imports kernel code: ops are named by string.
"""
