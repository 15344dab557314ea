"""The plugin for vLLM-Omni: `HERO_FX='{}' vllm serve --omni --diffusion-compile-granularity full ...`.

vLLM-Omni compiles layers one by one unless told to compile whole transformers; the plugin makes hero_fx the backend of
those. It knows the step of a call, and runs one request's whole loop after the other; sessions are told apart by the loop.

Nothing of vLLM-Omni is imported until its plugin loader calls `activate`. Read against 0.30.0, whose diffusion workers need a
GPU: what is here was not run inside a worker.
"""
