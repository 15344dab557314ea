"""From a plan to step graphs: what a full step keeps, and what a cached step does in place of a branch.

In the order in which they run (the passes themselves are listed in `hero_fx.stages`):

===================  ==============================================================================================
`plan`               strategies, what a full step keeps for them (`Recording`): the words of policies and passes
`resolve`            what a policy wants, cut down to what the model allows, with the token analysis of each branch
`record`             full step: features, gates, keys and values, and scores go into feature state
`refresh`            cached step: the sampled tokens of a branch are computed anew (HERO)
`refresh_scored`     cached step: those with the best scores are (ToCa, DuCa)
`extrapolate`        cached step: features are estimated from the last full steps, or reused
`outputs`            what a step graph returns is never feature state
`weigh`              coefficients of a calibrated plan in place of Taylor's weights
`rows_of_batch`      forecasts whose parts of the batch run by themselves: a graph for some rows of the batch
`forecast`           the outputs are estimated, and no layer runs: both its full and its cached step
`observe`            not for steps: graphs that show their features, for `hero_fx.stability`
===================  ==============================================================================================

What they are made of:

===================  ==============================================================================================
`features`           what is cached of a branch: node, gate, slots; the Taylor estimate
`recompute`          a refreshed branch: emitted for some tokens, merged into its cache, put in the branch's place
`subset`             the state of such an emission, `subset_ops` what each op becomes
`keep`, `rows`       which tokens are kept; how they get out of tensors and back
===================  ==============================================================================================
"""
