"""What `examples/aether/` runs on: the published model, its pipeline, windows, cameras, data sets and the paper's tables.

The package of Aether's authors is called `aether`; this one has another name so that both can be imported.
"""
