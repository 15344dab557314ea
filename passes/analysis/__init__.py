"""What a normalised graph is made of. Plain functions that change nothing and return frozen dataclasses.

In the order in which they build on each other:

================  ==================================================================================
`tokens`          the token axis of a tensor, as segments of token sources
`rules`           how ops that compute carry that axis
`moves`           how ops that move, cut or join it do
`exchange`        how exchanges between processes do
`follow`          the axis followed through a graph by these rules
`batch_rows`      the rows of the batch, by the same rules and some of their own: whether they meet
`memory`          which values share memory, and where the graph writes to it
`residuals`       the residual adds `x + f(x)`, and what depends on what
`streams`         residual streams and their tokens
`grid`            the grid that image tokens lie on
`stream_names`    which stream is text and which is the image
`branch_tokens`   the token axis through one branch
`branch_names`    layer numbers, labels and modules of branches
`branches`        each layer's attention and FFN branches
`structure`       the result: streams, branches and grid of a model, by name
`model_writes`    what the model's own in-place writes forbid
================  ==================================================================================
"""
