"""`hero_fx.verify`: a short trajectory of somebody's model, run in all the ways that must give the same."""
