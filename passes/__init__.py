"""FX graph passes and the pipeline that runs them; imported as `hero_fx.passes`."""

if __name__ != "hero_fx.passes":
    raise ImportError(f"`{__name__}` is part of hero_fx and no package of its own: import `hero_fx.passes`.")
