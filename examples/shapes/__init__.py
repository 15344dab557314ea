"""A second small model, of another family than `world`: Wan with flow matching, on moving shapes."""
