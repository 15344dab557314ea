"""Dynamo's graph made uniform: plain tensors, ATen ops, no writes, no autocast, branches in the form they are found in.

In the order in which they run:

================  ==================================================================================
`subclasses`      quantised weights become the plain tensors they are made of
`unmap`           regions of vmap are written out
`trace`           the graph is traced anew as pre-dispatch ATen ops, with a fake value at every node
`autocast`        autocast regions become the casts they make
`functionalize`   in-place ops become functional ones
`identities`      ops that return their input go
`unflatten`       products of flattened tokens keep the token axis
`join_groups`     arithmetic on groups of tokens is done on the token axis
`fused_updates`   residual updates in one op are split; at the very end, untouched ones are fused again
`constants`       at the very end, constants become literals again
================  ==================================================================================
"""
