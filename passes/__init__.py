"""FX graph passes and the analyses they go by; imported as `hero_fx.passes`.

Nothing in here imports from the rest of `hero_fx`. The folders, in the order in which a graph goes through them:

===============  ==================================================================================================
`normalize`      Dynamo's graph in one vocabulary: traced anew, without writes, branches in the form they are found in
`analysis`       what the graph holds, and changes nothing: branches, streams, where tokens are, what shares memory
`rewrite`        from a plan to step graphs: a full step that records features, cached steps that use them
`simplify`       exact algebra on step graphs: gather once, merge caches, drop what nothing reads; int8 state
===============  ==================================================================================================

What they share:

===============  ==================================================================================================
`pipeline`       what a pass is, and what runs it: lint, timing, logs, dumps, errors that name the pass
`slots`          what the extra inputs of a step graph stand for: all that graphs and the runtime agree on
`emit`           adding nodes with their fake values
`ops`            ops, their arguments and what they write to
`attention`      the attention ops: where each takes queries, keys, values and masks
`render`         graphs as text, and their differences
`compat`         private PyTorch APIs, each wrapped once
===============  ==================================================================================================

Which passes run, in which order and why, stands in `hero_fx.stages`.
"""

if __name__ != "hero_fx.passes":
    raise ImportError(f"`{__name__}` is part of hero_fx and no package of its own: import `hero_fx.passes`.")
