"""Warm start: step graphs that were compiled ahead of time, in a file.

================  ==================================================================================================
`called`          the call that a graph was compiled for, noted while Dynamo compiles it
`signature`       calls as plain data: which are alike, and what a call lacks to be one of those saved
`probe`, `asked`  asking a compiled model, without running it, where a graph's inputs come from and what it returns
`snapshot`        what a model's code sees of its modules, beside weights
`environment`     versions, source files, the processor, the device
`codec`           plain data as JSON
`archive`         the file
`package`         one step graph, compiled ahead of time, and loaded again
`save`, `load`    `hero_fx.save`, `hero_fx.load`
================  ==================================================================================================
"""
