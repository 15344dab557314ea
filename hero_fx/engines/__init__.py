"""hero_fx inside serving engines, as their plugins: installed with hero_fx, switched on by the environment variable `HERO_FX`.

| engine | module | entry point group |
|---|---|---|
| SGLang (diffusion) | `hero_fx.engines.sglang` | `sglang.multimodal_gen.plugins` |
| vLLM-Omni | `hero_fx.engines.vllm_omni` | `vllm_omni.general_plugins` |

`HERO_FX` holds options of `hero_fx.backend` as a JSON object: `HERO_FX='{"interval": 3}'`, or `HERO_FX='{}'` for the defaults.
Without it the plugins do nothing. Only transformers are compiled by hero_fx, never a VAE or a text encoder.
"""
