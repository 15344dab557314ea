"""What the tests share: small models, graphs of them, pipelines and references."""
