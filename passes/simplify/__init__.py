"""Exact rewrites of step graphs, which `rewrite` leaves in their literal form.

In the order in which they first run:

========================  ==========================================================================
`cleanup`                 nodes that nothing reads go, and at the end the state that no step reads
`common_subexpressions`   equal expressions are computed once
`scatters`                the shallow layers gather their tokens once and scatter them once
`write_rows`              of state, only the rows of sampled tokens are written
`summands`                which caches are only ever summed
`merge`                   these become one
`quantize`                8-bit state: float8 written as bytes, int8 with a scale per token
========================  ==========================================================================
"""
