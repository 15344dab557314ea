"""What runs at each call of a compiled model.

====================  ==============================================================================================
`calling`             what the caller says of a call: `session(...)`, `calling(...)`
`diffusers_context`   what diffusers' `cache_context(...)` says of it
`timestep`            reading the timestep
`evidence`            all that tells calls apart: the timestep, what was said, which inputs are those of before
`weights`             which model the call is of: models of one class share compiled code
`tracker`, `lanes`    from that to trajectory, step, lane, and whether the step is full
`state`, `lane_state` the feature state of that lane
`planned`             coefficients of a calibrated plan for that step
`filling`             numbers of the call, selected tokens
`inputs`              where all this is among the inputs of a graph
`batch`, `batched`    calls of several requests: what is said of them, and what runs
`rows`, `together`    their inputs, and their step graph with the state of all
`stepper`             the callable that Dynamo gets: all of the above, in this order, then the step graph
`watch`               notes, said once, where a trajectory seems to fall apart
====================  ==============================================================================================
"""
