"""A small world model: procedural scenes, a video transformer trained on them, and a diffusers pipeline around it."""
